"""The run file's `engine` section: which engine runs the target, and where. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from paceline.section import Device, Section, StartingValue
from paceline.table import resolve
from paceline.target.facts import TargetFacts
from paceline.target.settings import TargetSection
from paceline.types import Feature

if TYPE_CHECKING:
    from paceline.engines.engine import TargetEngine

PREFILL_ROWS = 8  # whose known tokens the target of `TransformersSection` reads together


@dataclass(frozen=True)
class EngineRun:
    """What a run gives its engine beside the sections of the run file.

    `features`: what the run's method asks for, given the target's facts. `directory`: the run's, or in it one
    of this producer's own. `files`:
    makes and returns a folder for the engine's own files, on the medium of the features. `date`: the date
    that the target's template sees. `should_stop`: an engine that waits looks at it.
    """

    features: Callable[[TargetFacts], Sequence[Feature]]
    directory: Path
    files: Callable[[], Path]
    date: str | None = None
    should_stop: Callable[[], bool] = lambda: False
    report: Callable[..., None] = lambda *_, **__: None


class EngineSection(Section):
    """Base of each engine's section; a subclass names the class to build from it in `component`."""

    component: ClassVar[str]  # "module:class", a TargetEngine with `of_run(section, target, run)`
    name: str

    @classmethod
    def starting_values(cls, run: str, gpus: int) -> list[StartingValue]:  # noqa: ARG003
        """What `paceline init` writes beside the name, for a run of this name on so many GPUs."""
        return []

    def build(self, target: TargetSection, run: EngineRun) -> TargetEngine:
        """Raises EngineError for a target that this engine cannot run."""
        engine: TargetEngine = resolve(self.component).of_run(self, target, run)
        return engine


class TransformersSection(EngineSection):
    """The target runs in the producer's process. Another device of the same kind changes no bit."""

    component: ClassVar[str] = "paceline.engines.transformers:TransformersEngine"
    changeable: ClassVar[tuple[str, ...]] = ("device",)
    name: Literal["transformers"] = "transformers"
    device: Device = "auto"

    @classmethod
    def starting_values(cls, run: str, gpus: int) -> list[StartingValue]:  # noqa: ARG003
        return [("device", "cuda:0" if gpus else "cpu", "")]
