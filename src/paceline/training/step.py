"""One optimizer step, readable alone: micro-batches in, one update out.

Losses are sums over tokens and the gradients are divided once by the step's token count, so how
a step is cut into micro-batches does not change its meaning. Nor does how it is spread over processes:
then the count is the whole step's, and is handed in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paceline.errors import TrainingError
from paceline.methods.method import DraftMethod, LossSums
from paceline.training.optimizer import learning_rate_at, set_learning_rate
from paceline.training.settings import OptimizerSettings

_LOSS = "loss sum"  # no method's metric is called that


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over the step's counted tokens; `metrics` are the method's means."""

    loss: float
    num_tokens: int
    grad_norm: float
    learning_rate: float
    metrics: dict[str, float]


def micro_batches(
    samples: Sequence[Mapping[str, torch.Tensor]], size: int
) -> list[list[Mapping[str, torch.Tensor]]]:
    """The samples in their order, `size` at a time; methods pack them, so lengths need not be alike."""
    return [list(samples[i : i + size]) for i in range(0, len(samples), size)]


@dataclass(frozen=True)
class _Accumulated:
    loss_sum: float
    num_tokens: int
    grad_norm: float
    metrics: dict[str, float]


def accumulate_gradients(
    samples: Sequence[Mapping[str, torch.Tensor]],
    draft: nn.Module,
    method: DraftMethod,
    *,
    micro_batch_size: int,
    autocast_dtype: torch.dtype | None,
    grad_clip: float,
    what: str,
    num_tokens: float | None = None,
) -> _Accumulated:
    """Mean gradients over the samples' tokens, clipped, in the draft's parameters; no update.

    The summed gradients are divided once, by `num_tokens` or else by the tokens of these samples. Where
    a wrapper of `draft` averages gradients over W processes, hand in the tokens of all, divided by W.
    Every micro-batch runs backward, so that such processes meet in each. Raises TrainingError, about
    `what`, if loss or gradient is not a finite number.
    """
    draft.zero_grad(set_to_none=True)
    device = next(draft.parameters()).device
    # Summed where they are: reading a number would make the processor wait for the device.
    totals: dict[str, torch.Tensor] = {}
    local_tokens = 0
    for micro_batch in micro_batches(samples, micro_batch_size):
        batch = method.collate(micro_batch, device)
        with _autocast(device, autocast_dtype):
            sums: LossSums = draft(batch)
        sums.loss_sum.backward()
        local_tokens += sums.num_tokens
        for name, value in {_LOSS: sums.loss_sum.detach(), **sums.metrics}.items():
            totals[name] = totals[name] + value.double() if name in totals else value.double()
    divisor = local_tokens if num_tokens is None else num_tokens
    if not divisor:  # nothing to learn: an optimizer's momentum must not move the weights either
        draft.zero_grad(set_to_none=True)
    gradients = [p.grad for p in draft.parameters() if p.grad is not None]
    for gradient in gradients:
        gradient.div_(divisor)
    grad_norm = _clip(draft, grad_clip)
    metrics = {name: float(value) for name, value in totals.items()}
    loss_sum = metrics.pop(_LOSS, 0.0)
    if not (torch.isfinite(torch.tensor([loss_sum, grad_norm])).all()):
        raise TrainingError(
            f"{what} has loss {loss_sum} and gradient norm {grad_norm}.",
            why="An update would destroy the weights; they are as they were after the step before.",
            next="lower training.learning_rate in a new run; the last checkpoint is unharmed.",
        )
    return _Accumulated(loss_sum, local_tokens, grad_norm, metrics)


def train_step(
    step: int,
    samples: Sequence[Mapping[str, torch.Tensor]],
    draft: nn.Module,
    method: DraftMethod,
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    *,
    micro_batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    num_tokens: float | None = None,
) -> StepResult:
    """`num_tokens` as in `accumulate_gradients`.

    Raises TrainingError, with the weights unchanged, if loss or gradient is not a finite number.
    """
    sums = accumulate_gradients(
        samples,
        draft,
        method,
        micro_batch_size=micro_batch_size,
        autocast_dtype=autocast_dtype,
        grad_clip=settings.grad_clip,
        what=f"Step {step}",
        num_tokens=num_tokens,
    )
    rate = learning_rate_at(step, settings)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    mean = sums.loss_sum / max(1, sums.num_tokens)
    figures = method.mean_metrics(sums.metrics)
    return StepResult(mean, sums.num_tokens, sums.grad_norm, rate, figures)


def _clip(draft: nn.Module, limit: float) -> float:
    """Scale the gradients to a norm of at most `limit`; the norm they had."""
    norm = nn.utils.clip_grad_norm_([p for p in draft.parameters() if p.grad is not None], limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # whole, if sharded


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
