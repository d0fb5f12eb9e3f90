"""The optimizer over the draft's parameters, its learning-rate schedule, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from paceline.training.muon import BlockMuon
from paceline.training.settings import TrainerSettings, TrainingSection


def learning_rate_at(step: int, settings: TrainerSettings, progress: float | None = None) -> float:
    """The rate of optimizer step `step` (the first is 1).

    A linear warm-up, then a cosine down to the final rate at `total_steps`; later steps keep the final rate.
    Without `total_steps` the rate is constant after the warm-up. The steps up to each of `totals_before` keep
    the rates that they had before the run was extended.

    `progress`: the share of the run that is done after the step, where the number of steps is unknown. Then
    the cosine falls with it (or up to `max_steps`, if that comes first), and the warm-up is a factor on it.
    """
    section = settings.training
    if progress is not None:
        most = section.max_steps
        done = progress if most is None else min(1.0, max(progress, step / most))
        return _cosine(section, done) * min(1.0, step / max(1, section.warmup_steps))
    if step <= section.warmup_steps:
        return section.learning_rate * step / section.warmup_steps
    total = next((before for before in settings.totals_before if step <= before), settings.total_steps)
    if total is None:
        return section.learning_rate
    span = max(1, total - section.warmup_steps)
    return _cosine(section, min(1.0, (step - section.warmup_steps) / span))


def _cosine(section: TrainingSection, done: float) -> float:
    fall = section.learning_rate - section.final_learning_rate
    return section.final_learning_rate + fall * 0.5 * (1.0 + math.cos(math.pi * done))


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers over parameters of their own that are stepped, and keep their state, as one."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.AdamW) -> None:
        groups = [*muon.param_groups, *adamw.param_groups]
        super().__init__(groups, {})
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        self.param_groups = groups
        muon.state = adamw.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None  # the trainer computes gradients itself
        for part in self.parts:
            part.step()


def build_optimizer(
    draft: nn.Module,
    settings: TrainingSection,
    scales: Mapping[str, float] | None = None,
    adamw_for: Sequence[str] = (),
) -> torch.optim.Optimizer:
    """One group per parameter: decay on matrices only, and the method's factor on the learning rate.

    `adamw_for`: what the method keeps from Muon, beside what the run file does.

    Fused AdamW passes over a parameter's memory once instead of a dozen times: a sixth of the time on a CPU.
    """
    chosen = settings.optimizer
    kept = (*adamw_for, *chosen.adamw_for)
    for_muon: list[dict[str, Any]] = []
    for_adamw: list[dict[str, Any]] = []
    for name, parameter in draft.named_parameters():
        if not parameter.requires_grad:
            continue
        group = {
            "params": [parameter],
            "weight_decay": settings.weight_decay if parameter.dim() >= 2 else 0.0,
            "rate_scale": (scales or {}).get(name, 1.0),
        }
        stays = chosen.name == "adamw" or parameter.dim() != 2 or any(n in name for n in kept)
        (for_adamw if stays else for_muon).append(group)
    rate, betas = settings.learning_rate, (settings.beta1, settings.beta2)
    adamw = torch.optim.AdamW(for_adamw, lr=rate, betas=betas, fused=True) if for_adamw else None
    if not for_muon:
        assert adamw is not None
        return adamw
    momentum, block_rows = chosen.momentum, chosen.block_rows
    muon: torch.optim.Optimizer
    if block_rows is None:
        muon = torch.optim.Muon(for_muon, lr=rate, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    else:
        muon = BlockMuon(for_muon, lr=rate, momentum=momentum, block_rows=block_rows)
    return MuonAndAdamW(muon, adamw) if adamw is not None else muon


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


def optimizer_tensors(draft: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """{"<parameter>.exp_avg": ...} for every parameter that has state."""
    return {
        f"{name}.{key}": value
        for name, parameter in draft.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    draft: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`, into a fresh optimizer of the same draft, on any device."""
    parameters = dict(draft.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition(".")
        parameter = parameters[parameter_name]
        # Fused AdamW needs all state on the weights' device, even the step count.
        optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)
