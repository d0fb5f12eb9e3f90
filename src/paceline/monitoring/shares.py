"""How long a process waited lately, from the sums that its events carry.

A role adds up its waits and tells the sum with every group or step, and once a second while it waits
(telemetry.BlockedTime). The difference of two sums, over the time between them, is the share that it waited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.roles.snapshot import finite_numbers

WINDOW_S = 60.0
LEAST_S = 2.0  # of a shorter time a share or a rate says nothing
Events = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Window:
    """The newest seconds of one process, from its first work on: loading a model is no wait."""

    begin: float
    end: float
    events: Events

    @classmethod
    def of(cls, events: Events, work: str, now: float, *, is_live: bool) -> Window:
        """`events`: of the role's newest process; `work`: the kind that tells of its work; `now`: Unix time.

        The window of a process that has ended is its last seconds.
        """
        begun = [place for place, event in enumerate(events) if event.get("event") == work]
        known = events[begun[0] :] if begun else ()
        times = [time for event in known if (time := time_of(event)) is not None]
        if not times:
            return cls(now, now, ())
        end = max(times[-1], now) if is_live else times[-1]
        return cls(max(times[0], end - WINDOW_S), end, known)

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def total(self, kind: str, name: str) -> float:
        """The sum of one figure over the events of a kind in the window."""
        return sum(finite_numbers(event).get(name, 0.0) for event in self._of(kind))

    def count(self, kind: str) -> int:
        return len(self._of(kind))

    def _of(self, kind: str) -> list[Mapping[str, Any]]:
        return [e for e in self.events if e.get("event") == kind and (time_of(e) or 0.0) > self.begin]

    def share(self, name: str) -> float | None:
        """By how much the sum `name` grew, over the window's time: 0 to 1; None if it was not told."""
        told = [
            (time, figures[name])
            for event in self.events
            if name in (figures := finite_numbers(event)) and (time := time_of(event)) is not None
        ]
        if self.seconds < LEAST_S or not told:
            return None
        before = next((value for time, value in reversed(told) if time <= self.begin), told[0][1])
        return min(1.0, max(0.0, (told[-1][1] - before) / self.seconds))

    def rate(self, kind: str, name: str) -> float | None:
        """The sum of a figure of the events of a kind, a second; None if there were none."""
        total = self.total(kind, name)
        return total / self.seconds if total and self.seconds >= LEAST_S else None


def time_of(event: Mapping[str, Any]) -> float | None:
    return finite_numbers(event).get("time")
