"""One optimizer step: micro-batches in, one update out.

Losses are sums over tokens, and the gradients are divided once by the step's token count. So neither the
size of the micro-batches nor the number of ranks changes the result, up to the order of sums; with several
ranks the caller passes the token count of the whole step (reduction.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paceline.errors import TrainingError
from paceline.loader.packing import packs
from paceline.methods.method import DraftMethod, LossSums
from paceline.training.compilation import failed_compilations_told
from paceline.training.optimizer import learning_rate_at, set_learning_rate
from paceline.training.reduction import Reduction, Sums
from paceline.training.settings import TrainerSettings, TrainingSection

_LOSS = "loss sum"  # a key that no method uses for a metric


@dataclass(frozen=True)
class Accumulated:
    """Sums over the samples' counted tokens, and the gradients' norm before it was clipped."""

    loss_sum: float
    num_tokens: int
    grad_norm: float
    metrics: dict[str, float]


def accumulate_gradients(
    samples: Sequence[Mapping[str, torch.Tensor]],
    draft: nn.Module,
    method: DraftMethod,
    settings: TrainerSettings,
    *,
    what: str,
    visit: int | None = None,
    num_tokens: float | None = None,
    reduction: Reduction | None = None,
) -> Accumulated:
    """Leave the clipped mean gradients over the samples' tokens in the draft's parameters; no update.

    The summed gradients are divided once, by `num_tokens` or else by the tokens of these samples.
    `reduction`: the samples are a part of the step's, and other ranks have the rest. If instead a wrapper of
    `draft` averages gradients over W processes, pass the tokens of all, divided by W. Every micro-batch runs
    backward, so that the processes synchronise in each. `visit`: see `DraftMethod.collate`. Raises
    TrainingError, which names `what`, if loss or gradient is not finite; and on every rank what one of them
    raises.
    """
    draft.zero_grad(set_to_none=True)
    if reduction is None:
        sums = _backward(samples, draft, method, settings, visit)
    else:
        sums = reduction(what, draft, _tried(samples, draft, method, settings, visit))
    divisor = sums.num_tokens if num_tokens is None else num_tokens
    if not divisor:  # nothing to learn; without gradients the optimizer's momentum moves no weight
        draft.zero_grad(set_to_none=True)

    def clip() -> float:
        return _mean_and_clip(draft, divisor, settings.training.grad_clip)

    grad_norm = clip() if reduction is None else reduction.together(clip)
    if not (torch.isfinite(torch.tensor([sums.loss_sum, grad_norm])).all()):
        raise TrainingError(
            f"{what} has loss {sums.loss_sum} and gradient norm {grad_norm}.",
            why="An update would destroy the weights. They are those of the step before.",
            next="lower training.learning_rate in a new run; the last checkpoint is unharmed.",
        )
    return Accumulated(sums.loss_sum, sums.num_tokens, grad_norm, sums.metrics)


def _backward(
    samples: Sequence[Mapping[str, torch.Tensor]],
    draft: nn.Module,
    method: DraftMethod,
    settings: TrainerSettings,
    visit: int | None,
) -> Sums:
    """Add the gradients of the samples' losses to the draft's."""
    device = next(draft.parameters()).device
    # Summed on the device: reading a number would make the processor wait for it.
    totals: dict[str, torch.Tensor] = {}
    num_tokens = 0
    for part in micro_batches(samples, settings.training):
        batch = method.collate(part, device, visit)
        with failed_compilations_told():
            with _autocast(device, settings.autocast_dtype):
                sums: LossSums = draft(batch)
            sums.loss_sum.backward()
        num_tokens += sums.num_tokens
        for name, value in {_LOSS: sums.loss_sum.detach(), **sums.metrics}.items():
            totals[name] = totals[name] + value.double() if name in totals else value.double()
    read = torch.stack(list(totals.values())).tolist() if totals else []  # here it waits, once
    metrics = dict(zip(totals, read, strict=True))
    return Sums(metrics.pop(_LOSS, 0.0), num_tokens, metrics)


def _tried(
    samples: Sequence[Mapping[str, torch.Tensor]],
    draft: nn.Module,
    method: DraftMethod,
    settings: TrainerSettings,
    visit: int | None,
) -> Sums | Exception:
    """`_backward`, or what it raised: the other ranks wait to hear of it."""
    try:
        return _backward(samples, draft, method, settings, visit)
    except Exception as error:  # noqa: BLE001 (raised again on every rank)
        return error


def micro_batches(
    samples: Sequence[Mapping[str, torch.Tensor]], training: TrainingSection
) -> list[Sequence[Mapping[str, torch.Tensor]]]:
    """The samples in order, in parts of `micro_batch_tokens` or `micro_batch_size`."""
    if training.micro_batch_tokens is None:
        size = training.micro_batch_size
        return [samples[start : start + size] for start in range(0, len(samples), size)]
    # The longest tensor of a sample is that of its tokens, the last of which the target did not process.
    lengths = [max(len(tensor) for tensor in sample.values()) - 1 for sample in samples]
    return [samples[part] for part in packs(lengths, training.micro_batch_tokens)]


@dataclass(frozen=True)
class Whole:
    """What a rank's own samples do not tell of a step. `num_tokens`: see `accumulate_gradients`.
    `progress`: see `learning_rate_at`."""

    num_tokens: float | None = None
    progress: float | None = None


def train_step(
    step: int,
    samples: Sequence[Mapping[str, torch.Tensor]],
    draft: nn.Module,
    method: DraftMethod,
    optimizer: torch.optim.Optimizer,
    settings: TrainerSettings,
    whole: Whole = Whole(),
    reduction: Reduction | None = None,
) -> dict[str, Any]:
    """One update of the draft; returns the event log's figures: means over the step's counted tokens.

    `reduction`: see `accumulate_gradients`. Raises TrainingError, with the weights unchanged, if loss or
    gradient is not finite.
    """
    sums = accumulate_gradients(
        samples,
        draft,
        method,
        settings,
        what=f"Step {step}",
        visit=visit_of(step, settings),
        num_tokens=whole.num_tokens,
        reduction=reduction,
    )
    rate = learning_rate_at(step, settings, whole.progress)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    return {
        "loss": sums.loss_sum / max(1, sums.num_tokens),
        "num_tokens": sums.num_tokens,
        "grad_norm": sums.grad_norm,
        "learning_rate": rate,
        **method.mean_metrics(sums.metrics),
    }


def visit_of(step: int, settings: TrainerSettings) -> int:
    """The number of a step's visits; runs of another seed have others."""
    return settings.seed * 1_000_003 + step


def _mean_and_clip(draft: nn.Module, divisor: float, limit: float) -> float:
    """Divide the gradients, and scale them to a norm of at most `limit`; returns their norm before.

    The norm of gradients that are divided among ranks is summed over the ranks.
    """
    reached = [parameter for parameter in draft.parameters() if parameter.grad is not None]
    for parameter in reached:
        assert parameter.grad is not None
        parameter.grad.div_(divisor)
    norm = nn.utils.clip_grad_norm_(reached, limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
