"""The run file's sections `training` and `checkpoint`, and the trainer's settings. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from paceline.section import Count, Device, Fraction, Section

if TYPE_CHECKING:
    import torch


class FlatSection(Section):
    """The curve is flat if none of the last `evaluations` points is above all before by more than `gain`."""

    evaluations: Count = 3
    gain: Annotated[float, Field(ge=0.0)] = 0.01


class OptimizerSection(Section):
    """`training.optimizer: NAME`, or a mapping with `name`.

    - `adamw`: for every parameter.
    - `muon`: updates a matrix by its momentum made orthogonal, scaled to the size of AdamW's updates, so that
      both take one `learning_rate` (arXiv 2502.16982, section 2.2). AdamW keeps all vectors, the matrices
      that the method names, and those whose names contain one of `adamw_for`. `block_rows`: it is made
      orthogonal in blocks of so many rows of its shorter side, which costs a part (muon.py); None: whole.
    """

    name: Literal["adamw", "muon"] = "adamw"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    block_rows: Annotated[int, Field(ge=2)] | None = None
    adamw_for: tuple[str, ...] = ("lm_head", "embed_tokens", "mask_hidden")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _knobs_are_read(self) -> OptimizerSection:
        chosen = self.model_dump(exclude_defaults=True, exclude={"name"})
        if chosen and self.name == "adamw":  # a recorded run file names the defaults, too
            raise ValueError(f"{next(iter(chosen))} belongs to muon; adamw does not read it")
        return self


class TrainingSection(Section):
    """The optimizer's knobs, and `batch_size` samples a step of it, in micro-batches of `micro_batch_size`.

    `tokens_per_step` (instead of `batch_size`): a step takes the next samples as long as the target processed
    at most so many tokens of them all; a longer sample is a step of its own. `micro_batch_tokens` (instead of
    `micro_batch_size`): the same for a micro-batch.
    `beta1` and `beta2` are AdamW's; the rates, `weight_decay` (of matrices) and `grad_clip` are every
    optimizer's.
    `passes`: how often each sample is trained on while its features are resident (loader/passes.py).
    `quarantine_max_in_a_row`: how many samples in a row may be quarantined. Then training stops, since the
    cause is hardly in the samples. `stop_when_flat`: end training early, once the acceptance lengths that are
    measured beside it (evaluation.every_steps) rise no more.
    `ema_decay`: the draft that is measured, exported and given away is the exponential moving average of the
    weights, of which each step keeps this share (average.py). None: it is the last weights.
    """

    changeable: ClassVar[tuple[str, ...]] = ("device", "quarantine_max_in_a_row", "stop_when_flat")
    optimizer: OptimizerSection = OptimizerSection()
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    passes: Count = 1
    batch_size: Count = 8
    tokens_per_step: Count | None = None
    micro_batch_size: Count = 8
    micro_batch_tokens: Count | None = None
    max_steps: Count | None = None
    quarantine_max_in_a_row: Annotated[int, Field(ge=0)] = 8
    device: Device = "auto"
    stop_when_flat: FlatSection | None = None

    @model_validator(mode="after")
    def _sizes_fit(self) -> TrainingSection:
        # A recorded run file names the defaults, too.
        for tokens, samples in (
            ("tokens_per_step", "batch_size"),
            ("micro_batch_tokens", "micro_batch_size"),
        ):
            is_default = getattr(self, samples) == type(self).model_fields[samples].default
            if getattr(self, tokens) is not None and not is_default:
                raise ValueError(f"training.{tokens} is instead of training.{samples}: give one of them")
        if self.tokens_per_step is None and self.micro_batch_tokens is None:
            if self.micro_batch_size > self.batch_size:
                raise ValueError("training.micro_batch_size must not exceed training.batch_size")
        elif (self.micro_batch_tokens or 0) > (self.tokens_per_step or math.inf):
            raise ValueError("training.micro_batch_tokens must not exceed training.tokens_per_step")
        return self


class CheckpointSection(Section):
    changeable: ClassVar[tuple[str, ...]] = ("interval_steps", "keep")
    interval_steps: Count = 25
    keep: Annotated[int, Field(ge=2)] = 2


@dataclass(frozen=True)
class TrainerSettings:
    """The trainer's sections of the run file, and values that follow from the rest of the run.

    `total_steps`: where the learning rate reaches its final value; None for a stream without an end.
    `totals_before`: the `total_steps` before each extension of the run, oldest first. `first_samples`: the
    number of samples from which the first weights are built. `sharded`: several ranks divide the weights and
    the optimizer among them (sharding.py).
    """

    total_steps: int | None
    first_samples: int
    training: TrainingSection = field(default_factory=TrainingSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    seed: int = 0
    autocast_dtype: torch.dtype | None = None
    totals_before: tuple[int, ...] = ()
    sharded: bool = False
