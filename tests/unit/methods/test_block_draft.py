"""What a block draft is: the servers' names, the target's tensors, the settings that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from block_case import HEADS, draft_of, head, method_of, samples

from paceline.errors import ConfigError
from paceline.methods.dflash.decode import DFlashDecoder
from paceline.methods.dflash.settings import spread_layers

# What vLLM 0.33 and SGLang 0.5.23 load, for 2 layers. Width 32, 4 and 2 heads of 8, inner 48, 3 states.
BACKBONE = {"fc.weight": (32, 96), "hidden_norm.weight": (32,), "norm.weight": (32,)} | {
    f"layers.{layer}.{name}.weight": shape
    for layer in (0, 1)
    for name, shape in {
        "input_layernorm": (32,),
        "post_attention_layernorm": (32,),
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "self_attn.q_norm": (8,),
        "self_attn.k_norm": (8,),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }.items()
}
ADDED: dict[str, dict[str, tuple[int, ...]]] = {
    "dflash": {},
    "dspark": {
        "markov_head.markov_w1.weight": (61, 6),
        "markov_head.markov_w2.weight": (61, 6),
        "confidence_head.proj.weight": (1, 38),
        "confidence_head.proj.bias": (1,),
    },
    "domino": {
        "prefix_gru.weight_ih_l0": (36, 32),
        "prefix_gru.weight_hh_l0": (36, 12),
        "embed_proj.0.weight": (5, 44),
        "embed_proj.2.weight": (61, 5),
    },
    "dflash2": {
        "candidate_selector.predecessor_codebook": (61, 6),
        "candidate_selector.successor_codebook": (61, 6),
        "candidate_selector.hidden_projection.weight": (6, 32),
        **{
            f"layers.{layer}.{name}.{part}": shape
            for layer in (0, 1)
            for name in ("attention_conv", "mlp_conv")
            for part, shape in (("base_kernel", (2, 3, 32)), ("kernel_projection.weight", (24, 32)))
        },
    },
}


@pytest.mark.parametrize("name", HEADS)
def test_names_and_shapes_are_the_servers(name: str) -> None:
    """No embedding, no lm_head: the target's are used. Every tensor is trained."""
    draft = draft_of(method_of(name))
    found = {key: tuple(tensor.shape) for key, tensor in draft.state_dict().items()}
    assert found == {**BACKBONE, **ADDED[name]}
    assert found.keys() == {key for key, _ in draft.named_parameters()}


def test_layers_are_spread_from_early_to_late() -> None:
    """One count from the state after two blocks to that before the last two."""
    assert spread_layers(30, 5) == (2, 8, 15, 22, 28)
    assert spread_layers(8, 5) == (2, 3, 4, 5, 6)
    assert spread_layers(30, 1) == (2,)


def test_what_does_not_fit_the_target_is_refused_before_training() -> None:
    """By check_target, with the knob to change."""
    for knobs, word in (({"target_states": 6}, "target_states"), ({"mask_token_id": 61}, "mask_token_id")):
        with pytest.raises(ConfigError, match=word):
            method_of("dflash", **knobs).check_target(head())
    for wrong in ({"name": "decay", "alpha": 0.25}, {"name": "dpace", "gamma": 2.0}):
        with pytest.raises(ConfigError, match="does not read it"):
            method_of("dflash", weighting=wrong)


@pytest.mark.parametrize("name", HEADS)
def test_a_decoder_has_weights_of_its_own_and_the_targets_tensors(name: str) -> None:
    """Training on does not move a decoder's guesses, and a large vocabulary is not held twice."""
    draft = draft_of(method_of(name))
    decoder = DFlashDecoder(draft, torch.float32)
    before = copy.deepcopy(dict(decoder.draft.named_parameters()))
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(1.0)
    assert all(torch.equal(w, before[key]) for key, w in decoder.draft.named_parameters())
    assert decoder.draft.target_output.rows.data_ptr() == draft.target_output.rows.data_ptr()
    assert decoder.draft.embed_tokens.data_ptr() == draft.embed_tokens.data_ptr()


@pytest.mark.parametrize("name", HEADS)
def test_a_tree_holds_the_chain(name: str) -> None:
    """The likeliest guess at each depth after the likeliest one is that of a greedy chain."""
    method = method_of(name)
    draft, sample = draft_of(method), samples()[1]
    tokens, aux = sample["input_ids"].long(), sample["aux_hidden_states"]
    decoder = method.drafter(draft, torch.float32)
    depths = draft.config.depths
    decoder.start(40)
    chain, _ = decoder.propose(aux[:8], tokens[1:9], depths, lambda logits: (int(logits.argmax()), None))
    assert len(chain) == depths
    decoder.start(40)
    guesses, parents = decoder.propose_tree(aux[:8], tokens[1:9], 30, 1, 99)
    assert (list(guesses), parents) == (chain, tuple(range(depths)))
    decoder.start(40)
    guesses, parents = decoder.propose_tree(aux[:8], tokens[1:9], 60, 5, depths)
    row = 0
    for token in chain:
        [row] = [
            i + 1
            for i, (g, parent) in enumerate(zip(guesses, parents, strict=True))
            if (g, parent) == (token, row)
        ]
