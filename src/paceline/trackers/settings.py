"""Where a run's curves go: the run file's `tracking` section."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from paceline.section import Section


class TrackingSection(Section):
    """`to`: the trackers that `paceline train` sends the curves to (table.py). `project`: what the run is
    filed under. Nothing of it decides weights."""

    changeable: ClassVar[tuple[str, ...]] = ("*",)
    to: tuple[str, ...] = ()
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "paceline"
