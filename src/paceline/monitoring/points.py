"""The points of a run's curves that are durable: each step once, and only when a checkpoint covers it.

A step that is trained again after a crash replaces what it was before a tracker saw it. So a tracker never
holds a step twice, nor one that was rolled back, and none needs to know how to take a point back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.evaluation.curve import read_curve
from paceline.ledger.records import CONSUMER
from paceline.regular_files import open_regular
from paceline.roles.snapshot import finite_numbers
from paceline.telemetry import FILE_BYTES_MAX, events_of
from paceline.trackers.tracker import HELDOUT, TRAIN, Point

RECOGNISED_BY = 512  # bytes; a line of an event has fewer, and a time in it
LEFT_OUT = ("event", "time", "step", "blocked_seconds")  # of a step: no figures of it


class DurablePoints:
    def __init__(self, directory: Path, newest: Mapping[str, int]) -> None:
        """`newest`: the last step of each series that is not wanted any more."""
        self._directory = directory
        self._events = AllEvents(directory / "events" / f"{CONSUMER}.jsonl")
        self._newest = dict(newest)
        self._pending: dict[int, Point] = {}  # training steps that no checkpoint covers yet

    @property
    def newest(self) -> Mapping[str, int]:
        return self._newest

    def read(self, head: int, facts: Mapping[str, Any]) -> list[Point]:
        """The points that are durable and were not returned before.

        `head`: the step of the newest durable checkpoint, read before this call: what it covers is in the
        events by now. `facts`: of the ledger.
        """
        for event in self._events.read():
            if (point := _trained(event)) is not None:
                self._pending[point.step] = point
        durable = [self._pending.pop(step) for step in sorted(self._pending) if step <= head]
        measured = [
            Point(HELDOUT, one.step, _measured_at(self._directory), _figures(one.report))
            for one in read_curve(self._directory, facts).points
        ]
        fresh = [point for point in (*durable, *measured) if point.step > self._newest.get(point.series, -1)]
        for point in fresh:
            self._newest[point.series] = point.step
        return fresh


class AllEvents:
    """Every event of a file, and then those that are added. A file that was cut to its tail is read anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at, self._before = 0, b""  # how far it was read, and the bytes before that

    def read(self) -> list[dict[str, Any]]:
        """What was not read yet; after a shortening, what is left and may have been read."""
        try:
            with open_regular(self._path) as file:
                file.seek(self._at - len(self._before))
                if file.read(len(self._before)) != self._before:
                    self._at, self._before = 0, b""
                    file.seek(0)
                data = file.read(2 * FILE_BYTES_MAX)
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        self._before = (self._before + whole)[-RECOGNISED_BY:]
        return events_of(whole)


def _trained(event: Mapping[str, Any]) -> Point | None:
    figures = finite_numbers(event)
    if event.get("event") != "step" or not {"step", "time"} <= figures.keys():
        return None
    kept = {name: value for name, value in figures.items() if name not in LEFT_OUT}
    return Point(TRAIN, int(figures["step"]), figures["time"], kept)


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    chain = report["chain"]
    tree = {} if report["branching"] == 1 else {"tree_acceptance_length": float(report["acceptance_length"])}
    names = ("acceptance_length", "emitted_per_cycle")
    return {**{name: float(chain[name]) for name in names}, **tree}


def _measured_at(directory: Path) -> float:
    try:
        return (directory / "evaluations.jsonl").stat().st_mtime
    except OSError:
        return 0.0
