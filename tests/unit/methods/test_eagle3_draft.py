"""The draft's names, vocabulary and initialisation, and how the target's head is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from paceline.errors import ConfigError
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.vocab import choose_draft_vocab, count_answer_tokens, draft_to_target, vocab_maps
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import HIDDEN, VOCAB, captured_sample, save_target, tiny_target

SGLANG_NAMES = {
    "fc.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.post_attention_layernorm.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight",
    "midlayer.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
    "norm.weight",
    "lm_head.weight",
    "d2t",
    "t2d",
}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> TargetHead:
    return TargetHead.load(save_target(tiny_target(), Path(tmp_path_factory.mktemp("target"))))


@pytest.fixture(scope="module")
def samples() -> list[dict[str, torch.Tensor]]:
    model = tiny_target()
    return [captured_sample(model, 20, 4, seed) for seed in range(3)]


@pytest.mark.parametrize("init", ["regression", "target", "random"])
def test_state_dict_has_the_names_and_shapes_sglang_loads(
    head: TargetHead, samples: list[dict[str, torch.Tensor]], init: str
) -> None:
    """Nothing but the EAGLE-3 checkpoint's names is exported, and q/k/v read twice the hidden size."""
    draft = Eagle3Method({"draft_vocab_size": 24, "init": init}).build(head, samples, seed=0)
    state = draft.state_dict()
    assert set(state) == SGLANG_NAMES
    assert state["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    assert state["midlayer.self_attn.q_proj.weight"].shape == (32, 2 * HIDDEN)
    assert state["midlayer.self_attn.k_proj.weight"].shape == (16, 2 * HIDDEN)
    assert state["lm_head.weight"].shape == (24, HIDDEN)
    assert (state["d2t"].dtype, state["d2t"].shape) == (torch.int64, (24,))
    assert (state["t2d"].dtype, state["t2d"].shape) == (torch.bool, (VOCAB,))
    assert {name for name, _ in draft.named_parameters()} == SGLANG_NAMES - {"d2t", "t2d"}


@pytest.mark.parametrize("init", ["regression", "target", "random"])
def test_building_a_draft_is_deterministic(
    head: TargetHead, samples: list[dict[str, torch.Tensor]], init: str
) -> None:
    """The same samples and seed give the same bits, whatever was drawn before; another seed does not."""
    method = Eagle3Method({"draft_vocab_size": 24, "init": init})
    built = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)
        built.append(method.build(head, samples, seed).state_dict())
    first, again, other = built
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_restored_draft_gives_the_same_loss(
    head: TargetHead, samples: list[dict[str, torch.Tensor]]
) -> None:
    """The state dict and the target are all of a draft, and no layer of the target is read for it."""
    method = Eagle3Method({"draft_vocab_size": 24, "init": "target"})
    draft = method.build(head, samples, seed=5)
    again = method.restore(dataclasses.replace(head, folder=None), draft.state_dict())
    batch = method.collate(samples, torch.device("cpu"))
    assert torch.equal(draft(batch).loss_sum, again(batch).loss_sum)


def test_unknown_setting_is_refused_with_the_known_ones() -> None:
    """A misspelt setting names itself and what would have been right."""
    with pytest.raises(ConfigError, match=r"ttt_step.*ttt_steps"):
        Eagle3Method({"ttt_step": 3})


def test_draft_vocab_takes_the_heaviest_then_the_lowest_ids() -> None:
    """Weights decide first, merge order breaks ties, and required tokens are always in."""
    weights = torch.zeros(10)
    weights[[7, 4]] = torch.tensor([3.0, 9.0])
    assert choose_draft_vocab(weights, 4).tolist() == [0, 1, 4, 7]
    assert choose_draft_vocab(weights, 4, always=[9]).tolist() == [0, 4, 7, 9]
    assert choose_draft_vocab(weights, 1).tolist() == [4]


@pytest.mark.parametrize(("size", "always"), [(11, []), (0, []), (1, [2, 3]), (3, [10])])
def test_draft_vocab_refuses_what_does_not_fit(size: int, always: list[int]) -> None:
    """Too large, too small for the required tokens, or a required token outside the vocabulary."""
    with pytest.raises(ConfigError):
        choose_draft_vocab(torch.zeros(10), size, always)


def test_vocab_maps_round_trip_as_offsets() -> None:
    """d2t stores target id minus draft id, and adding the draft id gives the target id back."""
    ids = torch.tensor([0, 2, 3, 8])
    d2t, t2d = vocab_maps(ids, 10)
    assert d2t.tolist() == [0, 1, 1, 5]
    assert torch.equal(draft_to_target(d2t), ids)
    assert torch.equal(t2d.nonzero().flatten(), ids)


def test_count_answer_tokens_counts_no_prompt_token() -> None:
    """Only processed tokens under the loss mask are evidence for the draft vocabulary."""
    counts = count_answer_tokens([(torch.tensor([1, 1, 2, 2, 3]), torch.tensor([0, 0, 1, 1, 1]))], 4)
    assert counts.tolist() == [0, 0, 2, 0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_target_head_reads_the_models_own_tensors(tmp_path: Path, tied: bool, shard: str) -> None:
    """Embedding, norm and lm_head equal the model's, tied or not, in one file or in shards."""
    model = tiny_target(tied=tied)
    head = TargetHead.load(save_target(model, tmp_path, shard))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert torch.equal(head.embed_tokens, model.model.embed_tokens.weight)
    assert torch.equal(head.norm_weight, model.model.norm.weight)
    assert torch.equal(head.lm_head, model.lm_head.weight)
    assert (head.rope_theta, head.rms_norm_eps, head.eos_token_ids) == (10000.0, 1e-5, (2,))


def test_target_head_names_the_missing_file(tmp_path: Path) -> None:
    """A folder that is no model is refused with its path before anything is trained."""
    with pytest.raises(ConfigError, match=r"config\.json"):
        TargetHead.load(tmp_path)


def test_warm_start_predicts_what_the_target_says_next(tmp_path: Path) -> None:
    """Without a single optimizer step the regressed draft beats a random one on unseen samples."""
    model = tiny_target()
    head = TargetHead.load(save_target(model, tmp_path))
    seen = [captured_sample(model, 60, 2, seed) for seed in range(24)]
    unseen = [captured_sample(model, 60, 2, seed) for seed in range(100, 104)]
    losses = {}
    for init in ("random", "regression"):
        method = Eagle3Method({"draft_vocab_size": VOCAB, "ttt_steps": 1, "init": init})
        draft = method.build(head, seen, seed=0)
        sums = draft(method.collate(unseen, torch.device("cpu")))
        losses[init] = float(sums.loss_sum.detach()) / sums.num_tokens
    assert losses["regression"] < 0.9 * losses["random"]


def test_learning_rate_scales_name_parameters_of_the_draft(
    head: TargetHead, samples: list[dict[str, torch.Tensor]]
) -> None:
    """A scale whose name no parameter bears would silently scale nothing."""
    method = Eagle3Method({"draft_vocab_size": 24, "init": "regression"})
    names = {name for name, _ in method.build(head, samples, seed=0).named_parameters()}
    assert method.learning_rate_scales()
    assert set(method.learning_rate_scales()) <= names
