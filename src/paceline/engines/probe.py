"""The probe: a check that the capture path gives the same states as the model's plain forward.

Once, before the first capture of a run, the engine answers a padded group of prompts of different lengths
greedily and captures it through the cache. Each sample is compared with a forward of its tokens alone,
without cache or padding, in three ways: the states after every block; the distribution that the draft is
trained on (from the head as the trainer builds it) against the model's own logits; and the argmax over the
captured states against the tokens that the target wrote. The bounds depend on the dtype of the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from paceline.engines.engine import Captured
from paceline.errors import CaptureMismatchError
from paceline.target.agreement import count_disagreements
from paceline.target.head import OutputLayer

TOKENS = "tokens"


@dataclass(frozen=True)
class Bounds:
    """`state`: the most that a row may differ, relative to its norm; `mean`: the same for the mean of rows.
    `stray`: the share of rows that may exceed them, because rounding sends a token to another expert.
    `distribution`: the largest mean total variation.

    Rounding alone gives about 5 %, 2 % on average and 1 % of total variation in bfloat16 (30 layers).
    """

    state: float
    mean: float
    stray: float
    distribution: float

    @classmethod
    def of(cls, dtype: torch.dtype, head: torch.dtype, *, experts: bool) -> Bounds:
        exact = dtype == torch.float32
        distribution = 1e-3 if exact and head == torch.float32 else 0.05
        state, mean = (2e-3, 5e-4) if exact else (0.2, 0.06)
        return cls(state, mean, 0.05 if experts else 0.0, distribution)


@dataclass(frozen=True)
class Plain:
    """The model's own forward of a sample's processed tokens: states by layer id [T, H], logits [T, V]."""

    states: Mapping[int, torch.Tensor]
    logits: torch.Tensor


def compare(
    family: str,
    samples: Sequence[Captured],
    plain: Callable[[list[int]], Plain],
    output: OutputLayer,
    bounds: Bounds,
) -> None:
    """Raise CaptureMismatchError, with family and reason, unless all samples agree with the model's forward.

    A sample holds TOKENS and, under "state K", the states of all its tokens after K blocks.
    """
    worst: dict[int, list[torch.Tensor]] = {}
    for sample in samples:
        tokens = sample.tensors[TOKENS].tolist()
        own = plain(tokens[:-1])
        for layer, expected in own.states.items():
            captured = sample.tensors[f"state {layer}"].float()
            worst.setdefault(layer, []).append(_row_errors(captured, expected.float(), family, layer))
        _compare_distribution(family, output(own.states[max(own.states)]), own.logits.float(), bounds)
    for layer, errors in worst.items():
        rows = torch.cat(errors)
        stray = float((rows > bounds.state).float().mean())
        usual = rows[rows <= bounds.state] if bounds.stray else rows
        if stray > bounds.stray or not len(usual) or float(usual.mean()) > bounds.mean:
            raise _mismatch(
                family,
                f"the states after block {layer} differ from the model's own by up to "
                f"{float(rows.max()):.1%} in {stray:.0%} of the rows",
            )


def _row_errors(captured: torch.Tensor, own: torch.Tensor, family: str, layer: int) -> torch.Tensor:
    if captured.shape != own.shape:
        raise _mismatch(family, f"block {layer} gives states of shape {tuple(own.shape)}")
    norms = own.norm(dim=-1)
    if not bool(torch.isfinite(norms).all()) or not bool((norms > 0).all()):
        raise _mismatch(family, f"the model's own states after block {layer} are zero or not finite")
    errors: torch.Tensor = (captured - own).norm(dim=-1) / norms
    return errors


def _compare_distribution(family: str, ours: torch.Tensor, own: torch.Tensor, bounds: Bounds) -> None:
    if ours.shape != own.shape:
        raise _mismatch(family, f"its head gives {ours.shape[-1]} logits, the model {own.shape[-1]}")
    if not bool(torch.isfinite(own).all()) or not bool(torch.isfinite(ours).all()):
        raise _mismatch(family, "the model's own logits are not finite (a weight is NaN or infinite)")
    apart = float((ours.softmax(-1) - own.softmax(-1)).abs().sum(-1).mean() / 2)
    if apart > bounds.distribution:
        raise _mismatch(family, f"the distribution to train on differs from the model's own by {apart:.1%}")


def compare_tokens(
    family: str, samples: Sequence[Captured], prompts: Sequence[int], output: OutputLayer, last: int
) -> None:
    """Raise CaptureMismatchError unless greedy answers are the argmax over their captured states."""
    for sample, prompt in zip(samples, prompts, strict=True):
        states = sample.tensors[f"state {last}"][prompt - 1 :]
        logits, tokens = output(states), sample.tensors[TOKENS][prompt:].to(states.device).long()
        if wrong := count_disagreements(logits, tokens, _eps(states, output)):
            raise _mismatch(
                family,
                f"{wrong} of {len(tokens)} tokens of an answer are not those that its captured states "
                "stand for",
            )


def _eps(states: torch.Tensor, output: OutputLayer) -> float:
    return max(torch.finfo(states.dtype).eps, torch.finfo(output.rows.dtype).eps)


def _mismatch(family: str, reason: str) -> CaptureMismatchError:
    return CaptureMismatchError(
        f"The target's family {family!r} cannot be captured from: {reason}.",
        why="A draft trained on this would imitate another model. Nothing was captured.",
        next="check that the model folder is whole and that transformers is the version of "
        "constraints.txt; else choose a target of another family.",
    )
