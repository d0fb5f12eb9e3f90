"""The run file's `engine` section: which engine runs the target, and where. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from paceline.section import Device, Section
from paceline.table import resolve
from paceline.target.settings import TargetSection

if TYPE_CHECKING:
    from paceline.engines.engine import TargetEngine


class EngineSection(Section):
    """Base of each engine's section; a subclass names the class to build from it in `component`."""

    component: ClassVar[str]  # "module:class", a TargetEngine with `of_run(section, target, date=)`
    name: str

    def build(self, target: TargetSection, *, date: str | None = None) -> TargetEngine:
        """`date`: the date that the target's template sees. Raises EngineError for a target that this engine
        cannot run."""
        engine: TargetEngine = resolve(self.component).of_run(self, target, date=date)
        return engine


class TransformersSection(EngineSection):
    """The target runs in the producer's process. Another device of the same kind changes no bit."""

    component: ClassVar[str] = "paceline.engines.transformers:TransformersEngine"
    changeable: ClassVar[tuple[str, ...]] = ("device",)
    name: Literal["transformers"] = "transformers"
    device: Device = "auto"
