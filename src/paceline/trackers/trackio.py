"""Trackio. Where it keeps runs (this machine, a Space, a server) is its own setting, as TRACKIO_SPACE_ID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paceline.trackers.package import imported, reaching
from paceline.trackers.tracker import Point, TrackedRun

NAME = "Trackio"


class Trackio:
    def __init__(self, run: TrackedRun) -> None:
        """Raises ConfigError without the package, PacelineError."""
        trackio = imported("trackio", "trackio")
        with reaching(NAME, "open the run"):
            self._run: Any = trackio.init(
                project=run.project,
                name=f"{run.name}-{run.identity[:8]}",  # a name is an id there
                resume="allow",
                config=dict(run.settings),
                private=True,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def newest(self) -> Mapping[str, int]:
        """It tells no series; the run's own record says what it was sent."""
        return {}

    def write(self, points: Sequence[Point]) -> None:
        with reaching(NAME, "take the points"):
            for point in points:
                self._run.log({**point.named, f"{point.series}/step": point.step}, step=point.step)

    def close(self) -> None:
        with reaching(NAME, "send the last points"):
            self._run.finish()
