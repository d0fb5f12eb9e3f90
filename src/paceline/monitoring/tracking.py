"""Sends a run's durable points to a tracker until the run ends, and goes on where it was after any end.

`trackers/NAME.json` in the run's folder says which steps a tracker has. It is written after they were sent,
so a kill in between sends them again; trackers that know what they hold leave those out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from paceline.durable_files import make_folder, replace_file
from paceline.errors import explained
from paceline.evaluation.curve import beginning_of
from paceline.ledger.facts import CONFIG, LEDGER
from paceline.ledger.locks import RoleLock
from paceline.ledger.records import Snapshot
from paceline.monitoring.looking import Look
from paceline.monitoring.points import DurablePoints
from paceline.monitoring.schema import RunStatus
from paceline.regular_files import read_regular
from paceline.roles.snapshot import open_run
from paceline.trackers.tracker import TrackedRun, Tracker

RECORD_BYTES_MAX = 1 << 16
SENT = ("method", "training", "checkpoint", "capture", "machine")  # sections; others may hold paths
PLACES = ("method.start_from",)  # a path in them
POINTS_AT_ONCE = 500


class Tracking:
    """One run, one tracker."""

    def __init__(self, name: str, open_tracker: Callable[[TrackedRun], Tracker], project: str) -> None:
        self._name, self._open, self._project = name, open_tracker, project
        self._tracker: Tracker | None = None
        self._points: DurablePoints | None = None
        self._record: Path | None = None
        self._identity = ""
        self._lock: RoleLock | None = None

    def send(self, status: RunStatus) -> int:
        """Send what is new and durable; the number of points. Raises PacelineError, OSError.

        After an error the next call opens the tracker anew, and goes on after what is known to be there.
        """
        directory = Path(status.directory)
        now = open_run(directory).snapshot()
        try:
            if self._points is None or _identity(now) != self._identity:
                self.close()  # a run that was here before
                self._begin(directory, now)
            return self._send(now)
        except BaseException:
            with suppress(Exception):
                self.close()
            raise

    def _send(self, now: Snapshot) -> int:
        assert self._points is not None
        assert self._tracker is not None
        fresh = self._points.read(-1 if now.head is None else now.head.step, now.facts)
        for first in range(0, len(fresh), POINTS_AT_ONCE):
            self._tracker.write(fresh[first : first + POINTS_AT_ONCE])
        if fresh:
            self._write_record()
        return len(fresh)

    def close(self) -> None:
        """Raises PacelineError."""
        tracker, self._tracker, self._points = self._tracker, None, None
        try:
            if tracker is not None:
                tracker.close()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _begin(self, directory: Path, now: Snapshot) -> None:
        self._lock = RoleLock(directory, f"tracker-{self._name}")
        self._identity = _identity(now)
        recorded = now.facts.get(CONFIG, {})
        settings = {key: value for key, value in recorded.items() if _may_be_sent(key, value)}
        name = str(recorded.get("run.name", directory.name))
        run = TrackedRun(name, self._identity, directory, settings, self._project)
        self._record = directory / "trackers" / f"{self._name}.json"
        self._tracker = self._open(run)
        known, there = self._read_record(), self._tracker.newest()
        newest = {series: max(known.get(series, -1), there.get(series, -1)) for series in {*known, *there}}
        self._points = DurablePoints(directory, newest)

    def _read_record(self) -> dict[str, int]:
        assert self._record is not None
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError, AttributeError):
            found: dict[str, Any] = json.loads(read_regular(self._record, RECORD_BYTES_MAX))
            if found["run"] == self._identity:
                return {str(series): int(step) for series, step in found["newest"].items()}
        return {}

    def _write_record(self) -> None:
        assert self._record is not None
        assert self._points is not None
        told: Mapping[str, object] = {"run": self._identity, "newest": self._points.newest}
        with suppress(OSError):  # a folder that cannot be written: then the tracker alone knows
            make_folder(self._record.parent)
            replace_file(self._record, (json.dumps(told) + "\n").encode())


def track(
    trackings: list[Tracking], look: Callable[[], Look], wait: Callable[[], bool], tell: Callable[[str], None]
) -> None:
    """Until the run is over, or `wait` returns True: then once more what is durable by now.

    A tracker that fails is told of and tried again; the others go on. Raises the error of one that still
    fails at the end.
    """
    told: set[str] = set()
    is_asked_to_end = False
    while True:
        found, errors = look(), list[Exception]()
        problems = [found.problem] if found.problem else []
        for one in () if found.status is None or found.problem else trackings:
            try:
                assert found.status is not None
                one.send(found.status)
            except Exception as error:  # noqa: BLE001 (a tracker's package may raise anything)
                errors.append(error)
                problems.append(f"{explained(error).what} It is tried again.")
        for problem in problems:
            if problem not in told:
                tell(problem)
        told = set(problems)
        if found.is_over or is_asked_to_end:
            break
        is_asked_to_end = wait()
    if errors:
        raise errors[-1]


def _may_be_sent(key: str, value: object) -> bool:
    """Not what names a place; a method of another package may have settings that do."""
    return key.partition(".")[0] in SENT and key not in PLACES and "/" not in str(value)


def _identity(now: Snapshot) -> str:
    """Of the run: that of its ledger, which a copy of the ledger keeps."""
    found = now.facts.get(LEDGER)
    return str(found["identity"]) if isinstance(found, dict) else beginning_of(now.facts)
