"""The run file: every knob of a run, with its unit and its limit.

One YAML file configures both roles and the evaluation. Fields decide the final weights unless
they are listed in `CHANGEABLE`; a resumed run refuses a change of any other (config/load.py).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
ROUNDS_MAX = 10_000
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    directory: Path
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class TargetSection(Section):
    model: Path
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


class PromptsSection(Section):
    """`rounds`: how often the prompt set is answered; from the second round on answers are sampled.

    `duplicates`: a line that repeats an earlier one is taken once, or refuses the run.
    """

    path: Path
    rounds: Annotated[int, Field(ge=1, le=ROUNDS_MAX)] = 1
    duplicates: Literal["once", "refuse"] = "once"
    max_prompt_tokens: Count = 192
    max_answer_tokens: Count = 128
    first_round_temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.8


class CaptureSection(Section):
    """`group_size`: prompts answered in one batch; the unit of capture and of re-capture.

    `failures_in_a_row_max`: if more prompts than these fail one after another, the producer stops.
    """

    group_size: Count = 64
    attempt_max: Count = 3
    failures_in_a_row_max: Count = 16


class FeaturesSection(Section):
    """`directory` holds the shared memory; `budget_mib` and, if given, `budget_samples` bound it."""

    store: Literal["shm"] = "shm"
    directory: Path = Path("/dev/shm")  # noqa: S108 (shared memory is what it is for)
    budget_mib: Count = 1024
    budget_samples: Count | None = None


class LedgerSection(Section):
    """What survives power loss: "head" syncs what durable weights depend on, "full" every change.

    Both survive `kill -9` whole. With "head" the newest commits and leases may vanish in a power loss;
    their prompts are then captured again (docs/guarantees.md).
    """

    durability: Literal["head", "full"] = "head"


class MethodSection(Section):
    """EAGLE-3. `first_samples`: how many of the run's first samples choose vocabulary and first weights.

    `recompute`: memory nearly flat in `ttt_steps`, for a price in speed (methods/eagle3/method.py).
    """

    name: Literal["eagle3"] = "eagle3"
    draft_vocab_size: Count = 8192
    first_samples: Count = 128
    ttt_steps: Annotated[int, Field(ge=1, le=16)] = 4
    step_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    init: Literal["regression", "target", "random"] = "regression"
    recompute: bool = False
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


class TrainingSection(Section):
    """`batch_size` samples an optimizer step, in micro-batches of `micro_batch_size`.

    `passes`: how often each sample is trained on while its features are resident (loader/passes.py).
    """

    passes: Count = 1
    batch_size: Count = 8
    micro_batch_size: Count = 8
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0
    max_steps: Count | None = None


class CheckpointSection(Section):
    interval_steps: Count = 25
    keep: Annotated[int, Field(ge=2)] = 2


class EvaluationSection(Section):
    """`draft_tokens` guesses a cycle as a tree; `branching: 1` = a chain. The chain is measured as well."""

    prompts: Path
    max_prompts: Count = 48
    max_new_tokens: Count = 96
    draft_tokens: Annotated[int, Field(ge=1, le=16)] = 7
    branching: Annotated[int, Field(ge=1, le=16)] = 4
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


class MachineSection(Section):
    """Threads of each role. The consumer's decide the bits of the weights, so they cannot change."""

    producer_threads: Count = 1
    consumer_threads: Count = 1
    restarts_max: Annotated[int, Field(ge=0)] = 10


class RunConfig(Section):
    run: RunSection
    target: TargetSection
    prompts: PromptsSection
    capture: CaptureSection = CaptureSection()
    features: FeaturesSection = FeaturesSection()
    ledger: LedgerSection = LedgerSection()
    method: MethodSection = MethodSection()
    training: TrainingSection = TrainingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection
    machine: MachineSection = MachineSection()

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> RunConfig:
        if self.training.micro_batch_size > self.training.batch_size:
            raise ValueError("training.micro_batch_size must not exceed training.batch_size")
        return self

    @property
    def ledger_path(self) -> Path:
        return self.run.directory / "ledger.db"

    @property
    def checkpoint_folder(self) -> Path:
        return self.run.directory / "checkpoints"

    @property
    def feature_folder(self) -> Path:
        """Its own for every run directory, so that two runs of one name never meet in memory."""
        place = hashlib.sha256(str(self.run.directory.resolve()).encode()).hexdigest()[:8]
        return self.features.directory / f"paceline-{self.run.name}-{place}"


# What may change between two starts of one run, because no bit of the weights depends on it.
CHANGEABLE = (
    "run.directory",
    "target.model",
    "prompts.path",  # the prompts themselves are known by their digests
    "prompts.duplicates",
    "capture.attempt_max",
    "capture.failures_in_a_row_max",
    "features.directory",
    "features.budget_mib",
    "features.budget_samples",
    "method.recompute",
    "ledger",
    "checkpoint.interval_steps",
    "checkpoint.keep",
    "evaluation",
    "machine.restarts_max",
)
