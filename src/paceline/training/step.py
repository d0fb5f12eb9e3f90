"""One optimizer step: micro-batches in, one update out.

Losses are sums over tokens, and the gradients are divided once by the step's token count. So neither the
size of the micro-batches nor the number of processes changes the result; with several processes the caller
passes the token count of the whole step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paceline.errors import TrainingError
from paceline.methods.method import DraftMethod, LossSums
from paceline.training.optimizer import learning_rate_at, set_learning_rate
from paceline.training.settings import TrainerSettings

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
) -> Accumulated:
    """Leave the clipped mean gradients over the samples' tokens in the draft's parameters; no update.

    The summed gradients are divided once, by `num_tokens` or else by the tokens of these samples. If a
    wrapper of `draft` averages gradients over W processes, pass the tokens of all, divided by W. Every
    micro-batch runs backward, so that the processes synchronise in each. `visit`: see `DraftMethod.collate`.
    Raises TrainingError, which names `what`, if loss or gradient is not finite.
    """
    draft.zero_grad(set_to_none=True)
    device, size = next(draft.parameters()).device, settings.training.micro_batch_size
    # Summed on the device: reading a number would make the processor wait for it.
    totals: dict[str, torch.Tensor] = {}
    local_tokens = 0
    for start in range(0, len(samples), size):
        batch = method.collate(samples[start : start + size], device, visit)
        with _autocast(device, settings.autocast_dtype):
            sums: LossSums = draft(batch)
        sums.loss_sum.backward()
        local_tokens += sums.num_tokens
        for name, value in {_LOSS: sums.loss_sum.detach(), **sums.metrics}.items():
            totals[name] = totals[name] + value.double() if name in totals else value.double()
    divisor = local_tokens if num_tokens is None else num_tokens
    if not divisor:  # nothing to learn; without gradients the optimizer's momentum moves no weight
        draft.zero_grad(set_to_none=True)
    gradients = [p.grad for p in draft.parameters() if p.grad is not None]
    for gradient in gradients:
        gradient.div_(divisor)
    grad_norm = _clip(draft, settings.training.grad_clip)
    metrics = {name: float(value) for name, value in totals.items()}
    loss_sum = metrics.pop(_LOSS, 0.0)
    if not (torch.isfinite(torch.tensor([loss_sum, grad_norm])).all()):
        raise TrainingError(
            f"{what} has loss {loss_sum} and gradient norm {grad_norm}.",
            why="An update would destroy the weights. They are those of the step before.",
            next="lower training.learning_rate in a new run; the last checkpoint is unharmed.",
        )
    return Accumulated(loss_sum, local_tokens, grad_norm, metrics)


def train_step(
    step: int,
    samples: Sequence[Mapping[str, torch.Tensor]],
    draft: nn.Module,
    method: DraftMethod,
    optimizer: torch.optim.Optimizer,
    settings: TrainerSettings,
    *,
    num_tokens: float | None = None,
) -> dict[str, Any]:
    """One update of the draft; returns the event log's figures: means over the step's counted tokens.

    `num_tokens`: see `accumulate_gradients`. Raises TrainingError, with the weights unchanged, if loss or
    gradient is not finite.
    """
    sums = accumulate_gradients(
        samples,
        draft,
        method,
        settings,
        what=f"Step {step}",
        visit=visit_of(step, settings),
        num_tokens=num_tokens,
    )
    rate = learning_rate_at(step, settings)
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


def _clip(draft: nn.Module, limit: float) -> float:
    """Scale the gradients to a norm of at most `limit`; returns their norm before."""
    norm = nn.utils.clip_grad_norm_([p for p in draft.parameters() if p.grad is not None], limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # a sharded norm is gathered


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
