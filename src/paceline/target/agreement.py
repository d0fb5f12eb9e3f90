"""Checks that the argmax over captured states gives the tokens that a greedy target wrote after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.errors import CaptureMismatchError
from paceline.target.head import TargetHead
from paceline.types import Feature, Rows, States, Targets, Tokens, name_of

SAMPLES_MAX = 16
STRAY_SHARE = 0.01  # of all tokens: ties that rounding decided outside its bound


def count_disagreements(logits: torch.Tensor, tokens: torch.Tensor, eps: float) -> int:
    """How many tokens [n] are not the argmax of logits [n, V], except ties within a relative error of eps."""
    best = logits.amax(-1)
    given = logits.gather(-1, tokens[:, None]).squeeze(-1)
    close = best - given <= 8 * eps * best.abs().clamp(min=1.0)
    return int((~close).sum())


def refuse_disagreement(
    head: TargetHead, features: Sequence[Feature], samples: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Raise CaptureMismatchError unless greedy answers are the argmax of the head over their states.

    For a method that keeps no last states nothing is checked.
    """
    last = _last_states(features, head.num_hidden_layers)
    if last is None:
        return
    token_name, target_name = name_of(Tokens, features), name_of(Targets, features)
    output, wrong, total = head.output(), 0, 0
    for sample in samples[:SAMPLES_MAX]:
        tokens, targets = sample[token_name].long(), sample[target_name].bool()
        states = sample[last.name] if last.rows == Rows.PREDICTED else sample[last.name][targets[1:]]
        logits, following = output(states), tokens[1:][targets[1:]]
        eps = max(torch.finfo(states.dtype).eps, torch.finfo(output.rows.dtype).eps)
        if not bool(torch.isfinite(logits).all()):
            raise _mismatch("the target's own distribution over its tokens is not finite")
        wrong, total = wrong + count_disagreements(logits, following, eps), total + len(following)
    if wrong > STRAY_SHARE * total:
        raise _mismatch(f"{wrong} of {total} tokens of its greedy answers are not the argmax of its states")


def _last_states(features: Sequence[Feature], num_layers: int) -> Feature | None:
    whole = [f for f in features if isinstance(f.source, States) and f.source.layers == (num_layers,)]
    return whole[0] if whole else None


def _mismatch(reason: str) -> CaptureMismatchError:
    return CaptureMismatchError(
        f"The first samples of the run do not come from this target: {reason}.",
        why="A draft trained on them would imitate another model. No sample is to blame, and nothing was "
        "trained.",
        next="check that target.model is the folder the samples were captured from, and report this with the "
        "name of the target.",
    )
