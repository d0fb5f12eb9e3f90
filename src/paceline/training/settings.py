"""What decides the weights, and how often they are made durable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OptimizerSettings:
    """Learning rates per step: linear warm-up, then a cosine down to the final one at `total_steps`.

    Later steps keep the final rate. `total_steps` None is for a stream without an end: constant after
    the warm-up.
    """

    total_steps: int | None
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0


@dataclass(frozen=True)
class TrainerSettings:
    """What decides the weights (seed, sizes, optimizer) and how often they are made durable.

    `first_samples`: how many of the run's first samples choose the draft vocabulary and warm-start.
    """

    optimizer: OptimizerSettings
    seed: int = 0
    micro_batch_size: int = 8
    first_samples: int = 64
    autocast_dtype: torch.dtype | None = None
    max_steps: int | None = None
    checkpoint_interval_steps: int = 25
    checkpoints_kept: int = 2
