"""RunConfig: the run file, composed of the sections that lie beside their components.

One YAML file configures both roles and the evaluation. A started run refuses a change of any field that its
section does not list as changeable, because it may decide the weights (config/load.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from paceline.capture.settings import CaptureSection
from paceline.config.costs import CostsSection
from paceline.data.settings import DataSection
from paceline.engines.settings import EngineSection
from paceline.evaluation.settings import EvaluationSection
from paceline.exports.settings import ExportSection
from paceline.features.settings import FeaturesSection
from paceline.ledger.place import opened, viewed
from paceline.ledger.settings import LedgerSection, SqliteSection
from paceline.methods.settings import MethodSection
from paceline.section import Section
from paceline.target.settings import TargetSection
from paceline.trackers.settings import TrackingSection
from paceline.training.settings import CheckpointSection, TrainingSection

if TYPE_CHECKING:
    from paceline.ledger.ledger import Ledger
    from paceline.ledger.view import LedgerView


class RunSection(Section):
    changeable: ClassVar[tuple[str, ...]] = ("directory",)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    directory: Path
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


Threads = Annotated[int, Field(ge=1, le=4096)]


class MachineSection(Section):
    """Threads of each role; their number decides bits, so it cannot change.

    `producers`: how many `paceline train` starts, each with `producer_threads`. `producer_timeout_s`: without
    a sign of life for so long, a producer is taken for dead by the others; a short one may cost work.
    `trainers`: how many processes, the ranks, train the draft together, each with `consumer_threads`; another
    number sums the same gradients in another order. `trainer_timeout_s`: a rank that the others have waited
    for so long is lost; then all start again from the newest checkpoint. `shard`: the ranks divide weights
    and optimizer among them (FSDP2), and each writes its part of a checkpoint.
    """

    changeable: ClassVar[tuple[str, ...]] = (
        *("restarts_max", "producers", "producer_timeout_s"),
        *("trainers", "trainer_timeout_s", "shard"),
    )
    producers: Annotated[int, Field(ge=1, le=256)] = 1
    producer_timeout_s: Annotated[float, Field(ge=0.5, le=86_400.0)] = 60.0
    trainers: Annotated[int, Field(ge=1, le=4096)] = 1
    trainer_timeout_s: Annotated[float, Field(ge=2.0, le=86_400.0)] = 300.0
    shard: bool = False
    producer_threads: Threads = 1
    consumer_threads: Threads = 1
    restarts_max: Annotated[int, Field(ge=0)] = 10


class RunConfig(Section):
    """The sections of every run. The run file selects the classes of method, engine, features and ledger."""

    run: RunSection
    target: TargetSection
    data: DataSection
    engine: EngineSection
    capture: CaptureSection = CaptureSection()
    features: FeaturesSection
    ledger: LedgerSection = SqliteSection()
    method: MethodSection
    training: TrainingSection = TrainingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection
    export: ExportSection = ExportSection()
    tracking: TrackingSection = TrackingSection()
    machine: MachineSection = MachineSection()
    costs: CostsSection = CostsSection()

    def open_ledger(self, tell: Callable[[str], None] = lambda _: None, *, joins: bool = False) -> Ledger:
        """The run's ledger, for a role; it is created if the run has none. See ledger/place.py.

        `tell` gets what the user should know; `joins`: the run may have begun in another folder.
        """
        return opened(self.ledger, self.run.directory, self.run.name, joins=joins, tell=tell)

    def view_ledger(self) -> LedgerView:
        """The run's ledger, for reading. Raises LedgerMissingError, LedgerError."""
        return viewed(self.ledger, self.run.directory, self.run.name)

    @property
    def checkpoint_folder(self) -> Path:
        return self.run.directory / "checkpoints"

    @property
    def feature_folder(self) -> Path:
        """Unique to the run directory, so that two runs of one name never share memory."""
        place = hashlib.sha256(str(self.run.directory.resolve()).encode()).hexdigest()[:8]
        return self.features.directory / f"paceline-{self.run.name}-{place}"
