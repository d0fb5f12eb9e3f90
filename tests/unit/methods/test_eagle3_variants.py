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
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import HIDDEN, VOCAB, captured_sample, save_target, tiny_target

STEPS, LENGTH = 3, 40
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a norm before fc": {"norm_before_fc": True},
    "a norm for each state": {"fc_norm": True},
    "the normed output is fed back": {"norm_output": True},
    "a window": {"sliding_window": 17},
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
    method = Eagle3Method({"draft_vocab_size": VOCAB, "ttt_steps": STEPS, "init": "random", **choices})
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
