"""Tracker: where the curves of runs are kept and compared. One adapter for each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

TRAIN, HELDOUT = "train", "heldout"  # the series


@dataclass(frozen=True)
class Point:
    """The figures of one step in one series. `time`: Unix time."""

    series: str
    step: int
    time: float
    figures: Mapping[str, float] = field(hash=False)

    @property
    def named(self) -> dict[str, float]:
        """The figures under the names that a tracker shows: train/loss."""
        return {f"{self.series}/{name}": value for name, value in self.figures.items()}


@dataclass(frozen=True)
class TrackedRun:
    """`identity`: stays with the run over restarts and moves. `settings`: without paths and addresses."""

    name: str
    identity: str
    directory: Path
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)
    project: str = "paceline"

    @property
    def key(self) -> str:
        """The run's id in a tracker: the same after a crash, and another one for a run that begins anew."""
        return f"paceline-{self.identity[:16]}"


class Tracker(Protocol):
    """A run of the tracker, opened or continued. Adapters: table.py. They pass testing/tracker_suite.py."""

    def newest(self) -> Mapping[str, int]:
        """The last step that is there already, by series; a series without one is missing."""

    def write(self, points: Sequence[Point]) -> None:
        """Add points; their steps grow within a series. They are there when it returns, or are sent soon."""

    def close(self) -> None:
        """Send what is left."""
