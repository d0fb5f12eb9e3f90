"""One optimizer step, readable alone: micro-batches in, one update out.

Losses are sums over tokens and the gradients are divided once by the step's token count, so how
a step is cut into micro-batches does not change its meaning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paceline.errors import TrainingError
from paceline.methods.method import DraftMethod
from paceline.training.optimizer import OptimizerSettings, learning_rate_at, set_learning_rate


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
    """Samples of like length together, so that little is padded. A pure function of the lengths."""
    by_length = sorted(samples, key=lambda sample: sample["input_ids"].shape[0])
    return [list(by_length[i : i + size]) for i in range(0, len(by_length), size)]


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
) -> StepResult:
    """Raises TrainingError, with the weights unchanged, if loss or gradient is not a finite number."""
    optimizer.zero_grad(set_to_none=True)
    loss_sum, num_tokens = 0.0, 0
    metrics: dict[str, float] = {}
    for micro_batch in micro_batches(samples, micro_batch_size):
        batch = method.collate(micro_batch)
        with _autocast(autocast_dtype):
            sums = method.loss(draft, batch)
        if sums.num_tokens:
            sums.loss_sum.backward()
        loss_sum += float(sums.loss_sum.detach())
        num_tokens += sums.num_tokens
        for name, value in sums.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    rate = learning_rate_at(step, settings)
    parameters = [p for p in draft.parameters() if p.grad is not None]
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.div_(max(1, num_tokens))
    grad_norm = float(nn.utils.clip_grad_norm_(parameters, settings.grad_clip))
    if not (torch.isfinite(torch.tensor([loss_sum, grad_norm])).all()):
        raise TrainingError(
            f"Step {step} has loss {loss_sum} and gradient norm {grad_norm}.",
            why="An update would destroy the weights; they are as they were after the step before.",
            next="lower training.learning_rate in a new run; the last checkpoint is unharmed.",
        )
    set_learning_rate(optimizer, rate)
    optimizer.step()
    mean = loss_sum / max(1, num_tokens)
    return StepResult(mean, num_tokens, grad_norm, rate, method.mean_metrics(metrics, num_tokens))


def _autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=dtype)
