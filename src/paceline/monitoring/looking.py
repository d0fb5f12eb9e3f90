"""Looks at a run again and again: before it begins, while it goes on, and until it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paceline.errors import explained
from paceline.monitoring.schema import RunStatus
from paceline.monitoring.status import read_status
from paceline.roles.snapshot import has_ledger, making_sense

LINGER_S = 5.0  # between two processes of a run
EVALUATOR_S = 30.0  # between the end of training and the evaluation of it


@dataclass(frozen=True)
class Look:
    """`status`: the newest that could be read; None before the run begins. `problem`: why it is not of now.

    `is_over`: the run is complete, or nothing lives and moves in it any more.
    """

    status: RunStatus | None = None
    problem: str = ""
    is_over: bool = False


class RunLooks:
    def __init__(self, find: Callable[[], Path | None], clock: Callable[[], float] = time.monotonic) -> None:
        """`find`: the run's directory; None: there is none yet."""
        self._find, self._clock = find, clock
        self._last: RunStatus | None = None
        self._moved_at = clock()

    def look(self) -> Look:
        """Never fails because of the run: a ledger that cannot be read now is looked at again."""
        try:
            directory = self._find()
            if directory is None or (not has_ledger(directory) and self._last is None):
                return Look(problem=f"waiting for the run to begin{f' in {directory}' if directory else ''}")
            with making_sense(directory):
                status = read_status(directory)
        except Exception as error:  # noqa: BLE001 (it is shown)
            return Look(self._last, f"it cannot be read now: {explained(error).what}")
        first, lives = self._last is None, any(one.state != "ended" for one in status.processes)
        if lives or first or self._last is None or status.lsn != self._last.lsn:
            self._moved_at = self._clock()
        self._last = status
        patience_s = EVALUATOR_S if _lacks_evaluation(status) else LINGER_S
        rests = not lives and self._clock() - self._moved_at >= patience_s
        return Look(status, is_over=rests or (first and not lives and status.state == "complete"))


def _lacks_evaluation(status: RunStatus) -> bool:
    last = status.evaluation.curve[-1].step if status.evaluation.curve else -1
    return status.state == "complete" and last < status.step.number
