"""EAGLE-3.1's choices: training sees what decoding sees, and what the settings refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.methods.eagle3.parallel import ParallelDecoder, PEagleMethod
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import HIDDEN, VOCAB, captured_sample, save_target, tiny_target

STEPS, LENGTH = 3, 40
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a norm before fc": {"norm_before_fc": True},
    "a norm for each state": {"fc_norm": True},
    "the normed output is fed back": {"norm_output": True},
    "a window": {"sliding_window": 17},
    "parallel": {"name": "p-eagle"},
    "parallel, a norm and a window": {"name": "p-eagle", "norm_before_fc": True, "sliding_window": 18},
    "all": {"fc_norm": True, "norm_output": True, "sliding_window": 20},
}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> TargetHead:
    return TargetHead.load(save_target(tiny_target(), Path(tmp_path_factory.mktemp("target"))))


@pytest.fixture(scope="module")
def sample() -> dict[str, torch.Tensor]:
    return captured_sample(tiny_target(), LENGTH, 4, seed=1)


def _built(
    head: TargetHead, sample: dict[str, torch.Tensor], choices: dict[str, Any]
) -> tuple[Eagle3Method, Eagle3Draft]:
    kind = PEagleMethod if choices.get("name") == "p-eagle" else Eagle3Method
    method = kind({"draft_vocab_size": VOCAB, "ttt_steps": STEPS, "init": "random", **choices})
    draft = method.build(head, [sample], seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in draft.parameters():  # no weight may hide a mistake by being zero or one
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return method, draft


def _trained_logits(
    method: Eagle3Method, draft: Eagle3Draft, sample: dict[str, torch.Tensor]
) -> tuple[list[int], torch.Tensor]:
    """(anchors, logits [S, A, D]) of the training loss."""
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        seen.append(output.detach())

    handle = draft.lm_head.register_forward_hook(keep)
    batch = method.collate([sample], torch.device("cpu"))
    draft(batch)
    handle.remove()
    return batch.anchors.tolist(), seen[0].view(STEPS, -1, VOCAB)


@pytest.mark.parametrize("choices", VARIANTS.values(), ids=VARIANTS)
def test_training_computes_what_decoding_computes(
    head: TargetHead, sample: dict[str, torch.Tensor], choices: dict[str, Any]
) -> None:
    """From every anchor, fed the sample's own tokens, a chain has the logits of the unrolled steps."""
    method, draft = _built(head, sample, choices)
    anchors, trained = _trained_logits(method, draft, sample)
    tokens, aux = sample["input_ids"].long(), sample["aux_hidden_states"]
    decoder = method.drafter(draft, torch.float32)
    decoder.start(LENGTH + STEPS)
    done = 0
    for place, anchor in enumerate(anchors):
        seen: list[torch.Tensor] = []

        def choose(
            logits: torch.Tensor, seen: list[torch.Tensor] = seen, at: int = anchor
        ) -> tuple[int, None]:
            seen.append(logits)
            return int(tokens[min(at + 1 + len(seen), LENGTH)]), None

        decoder.propose(aux[done : anchor + 1], tokens[done + 1 : anchor + 2], STEPS, choose)
        done = anchor + 1
        steps = min(STEPS, LENGTH - 1 - anchor)  # no later step has a token to predict
        torch.testing.assert_close(torch.stack(seen)[:steps], trained[:steps, place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_each_choice_changes_what_is_computed(
    head: TargetHead, sample: dict[str, torch.Tensor], name: str
) -> None:
    """With the same weights a draft that makes the choice says something else."""
    method, draft = _built(head, sample, VARIANTS[name])
    plain, other = _built(head, sample, {})
    other.load_state_dict(draft.state_dict(), strict=False)
    with_choice, without = (_trained_logits(*pair, sample)[1] for pair in ((method, draft), (plain, other)))
    assert float((with_choice - without).abs().max()) > 1e-2


def test_norms_before_fc_have_the_servers_names_and_shapes(
    head: TargetHead, sample: dict[str, torch.Tensor]
) -> None:
    """One of the width of all fused states, or one of a state's width for each."""
    plain = set(_built(head, sample, {})[1].state_dict())
    joint = _built(head, sample, {"norm_before_fc": True})[1].state_dict()
    each = _built(head, sample, {"fc_norm": True, "norm_output": True, "sliding_window": 30})[1].state_dict()
    assert joint.keys() - plain == {"input_norm.weight"}
    assert joint["input_norm.weight"].shape == (3 * HIDDEN,)
    assert each.keys() - plain == {f"fc_norm.{n}.weight" for n in range(3)}
    assert each["fc_norm.0.weight"].shape == (HIDDEN,)


@pytest.mark.parametrize("init", ["regression", "random"])
def test_a_frozen_head_is_the_targets_and_stays(
    head: TargetHead, sample: dict[str, torch.Tensor], init: str
) -> None:
    """It is in the state dict, no optimizer sees it, and every other gradient is that of a trained one."""
    settings = {"draft_vocab_size": 30, "ttt_steps": STEPS, "init": init}
    method = Eagle3Method({**settings, "train_lm_head": False})
    draft = method.build(head, [sample], seed=3)
    assert torch.equal(draft.state_dict()["lm_head.weight"], head.lm_head[draft.target_ids()].float())
    assert "lm_head.weight" not in dict(draft.named_parameters())
    other = Eagle3Method(settings).restore(head, draft.state_dict())
    grads = []
    for each in (draft, other):
        each(method.collate([sample], torch.device("cpu"))).loss_sum.backward()
        grads.append({name: weight.grad for name, weight in each.named_parameters()})
    assert grads[1].keys() - grads[0].keys() == {"lm_head.weight"}
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


@pytest.mark.parametrize("choices", [{"norm_before_fc": True}, {"fc_norm": True}])
def test_a_regressed_start_predicts_through_its_norms(head: TargetHead, choices: dict[str, Any]) -> None:
    """The regression is of what fc reads: without a step the draft beats a random one on unseen samples."""
    model = tiny_target()
    seen = [captured_sample(model, 60, 2, seed) for seed in range(24)]
    unseen = [captured_sample(model, 60, 2, seed) for seed in range(100, 103)]
    losses = {}
    for init in ("random", "regression"):
        method = Eagle3Method({"draft_vocab_size": VOCAB, "ttt_steps": 1, "init": init, **choices})
        sums = method.build(head, seen, seed=0)(method.collate(unseen, torch.device("cpu")))
        losses[init] = float(sums.loss_sum.detach()) / sums.num_tokens
    assert losses["regression"] < 0.9 * losses["random"]


@pytest.mark.parametrize(
    ("choices", "reason"),
    [({"norm_before_fc": True, "fc_norm": True}, "choose one"), ({"sliding_window": 16}, "17")],
)
def test_choices_that_exclude_each_other_are_refused(choices: dict[str, Any], reason: str) -> None:
    """Two norms of the same states; a window that a chain of guesses could outgrow."""
    with pytest.raises(ConfigError, match=reason):
        Eagle3Method(choices)


def _mask_rows_by_brute_force(
    draft: Eagle3Draft, sample: dict[str, torch.Tensor], anchor: int, steps: int
) -> torch.Tensor:
    """Logits [steps, D] of one pass over the text's rows up to `anchor` and the mask rows after them, by
    plain causal attention over the whole sequence."""
    assert draft.mask_hidden is not None
    aux, tokens = sample["aux_hidden_states"][: anchor + 1], sample["input_ids"].long()
    states = torch.cat([aux, draft.mask_hidden.expand(steps - 1, -1)])
    ids = torch.cat([tokens[1 : anchor + 2], torch.full((steps - 1,), draft.config.mask_token_id)])
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    feature = draft.fc(states)
    inputs = layer.inputs(draft.embed(ids), feature)[None]
    positions = torch.arange(anchor + steps)[None]
    keys, values = attention.key_value(inputs, positions)
    query = attention.query(inputs, positions)
    mixed = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    return draft.logits(layer.finish(feature[None], mixed)[0])[-steps:]


@torch.no_grad()
def test_a_parallel_drafts_rows_see_what_one_causal_pass_would_show_them(
    head: TargetHead, sample: dict[str, torch.Tensor]
) -> None:
    """For every anchor: the text up to it, and its own mask rows in order; no other anchor's."""
    method, draft = _built(head, sample, {"name": "p-eagle", "mask_token_id": 7})
    anchors, trained = _trained_logits(method, draft, sample)
    for place, anchor in enumerate(anchors):
        expected = _mask_rows_by_brute_force(draft, sample, anchor, STEPS)
        torch.testing.assert_close(trained[:, place], expected, rtol=1e-4, atol=1e-4)


def test_a_parallel_tree_holds_the_likeliest_paths(head: TargetHead, sample: dict[str, torch.Tensor]) -> None:
    """A path's likelihood is the product of its places' probabilities; parents come before children."""
    method, draft = _built(head, sample, {"name": "p-eagle"})
    decoder = method.drafter(draft, torch.float32)
    assert isinstance(decoder, ParallelDecoder)
    aux, ids = sample["aux_hidden_states"][:9], sample["input_ids"][1:10].long()
    seen: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> tuple[int, None]:
        seen.append(logits.log_softmax(-1))
        return int(logits.argmax()), None

    decoder.start(64)
    chain, _ = decoder.propose(aux, ids, 3, choose)
    decoder.start(64)
    tokens, parents = decoder.propose_tree(aux, ids, num_tokens=6, branching=3, depth=3)
    paths = [(int(d),) for d in seen[0].topk(3).indices]
    every = list(paths)
    for level in (1, 2):
        paths = [(*path, int(d)) for path in paths for d in seen[level].topk(3).indices]
        every += paths
    score = {path: sum(float(seen[k][d]) for k, d in enumerate(path)) for path in every}
    wanted = sorted(every, key=lambda path: -score[path])[:6]
    of_row: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        assert parent < len(of_row), "a parent comes before its children"
        of_row.append((*of_row[parent], token))
    assert sorted(of_row[1:]) == sorted(wanted)
    assert tuple(chain) in score


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"norm_output": True}, "norm_output does not go"),
        ({"fc_norm": True}, "fc_norm does not go"),
        ({"ttt_steps": 1}, "greater than or equal to 2"),
    ],
)
def test_what_a_parallel_draft_lacks_is_refused(choices: dict[str, Any], reason: str) -> None:
    """Nothing is fed back; servers would drop a norm of each state; a single step is no parallel draft."""
    with pytest.raises(ConfigError, match=reason):
        PEagleMethod(choices)


def test_a_mask_token_beyond_the_vocabulary_is_refused(head: TargetHead) -> None:
    """Before anything is captured, with the largest id that there is."""
    with pytest.raises(ConfigError, match=f"{VOCAB} tokens"):
        PEagleMethod({"mask_token_id": VOCAB, "draft_vocab_size": 24}).check_target(head)
