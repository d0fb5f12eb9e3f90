"""What a run has done since its start: its curves, and the timeline of every process. It writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from paceline.evaluation.curve import read_curve
from paceline.ledger.locks import live_holder
from paceline.ledger.records import CONSUMER
from paceline.monitoring.points import AllEvents
from paceline.roles.snapshot import finite_numbers
from paceline.roles.workers import is_producer

POINTS_MAX = 600  # of a curve; a longer one is drawn by means of neighbours
MARKS_MAX = SPANS_MAX = 500  # of a role, the newest ones
FILES_MAX = 300
TIME_MAX = 1e11  # seconds since 1970
STEPS_MAX = 1 << 53  # a greater number is none, and JSON could not hold it
ESTIMATE = "acceptance_length_estimate"
MARKS = {
    "taken_over": "took over another producer's prompts",
    "group_failed": "a capture group failed",
    "made_room": "freed later samples",
    "resumed": "went on after step {step}",
    "step_failed": "a step failed",
    "quarantined": "put a sample in quarantine",
    "checkpoint": "checkpoint of step {step}",
    "checkpoint_damaged": "found a checkpoint damaged",
    "fall_back": "went back to an older checkpoint",
    "rolled_forward": "caught up with a newer checkpoint",
    "ranks": "{ranks} ranks train",
    "evaluated": "measured the draft",
}


class TrainedPoint(Struct, frozen=True, kw_only=True):
    """A step, or the mean over neighbouring steps up to `step`."""

    step: int
    loss: float | None
    acceptance_length: float | None  # estimated from the training data


class MeasuredPoint(Struct, frozen=True, kw_only=True):
    """A checkpoint on held-out prompts. `by_position`: the share of the chain's cycles in which its first,
    second, ... draft token is accepted; their sum is the acceptance length without its 1."""

    step: int
    acceptance_length: float
    by_position: tuple[float, ...]
    tree_acceptance_length: float | None = None


class Span(Struct, kw_only=True):
    """The life of one process. `ended`: "", `done`, `stopped`, `error`, or `killed`: it told of no end."""

    begin: float
    end: float
    pid: int | None = None
    ended: str = ""
    message: str = ""


class Mark(Struct, frozen=True, kw_only=True):
    time: float
    event: str
    words: str


class RoleTimeline(Struct, frozen=True, kw_only=True):
    role: str
    spans: tuple[Span, ...]
    marks: tuple[Mark, ...]


class RunHistory(Struct, frozen=True, kw_only=True):
    """`timeline`: times in seconds since 1970 UTC."""

    trained: tuple[TrainedPoint, ...]
    measured: tuple[MeasuredPoint, ...]
    timeline: tuple[RoleTimeline, ...]


class HistoryReader:
    """Reads the events of a run once, and at each further look what was added."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._steps: dict[int, TrainedPoint] = {}
        self._roles: dict[str, _Role] = {}

    def read(self, facts: Mapping[str, Any]) -> RunHistory:
        """`facts`: of the ledger. Never fails because of a file: what cannot be read is left out."""
        for role in self._named():
            known = self._roles.setdefault(role, _Role(self._directory / "events" / f"{role}.jsonl"))
            events = known.look(live_holder(self._directory, role) is not None)
            if role == CONSUMER:
                self._train(events)
        return RunHistory(
            trained=tuple(_thinned(list(self._steps.values()))),
            measured=tuple(
                MeasuredPoint(
                    step=point.step,
                    acceptance_length=point.acceptance_length,
                    by_position=tuple(map(float, point.report["chain"]["acceptance_rate"])),
                    tree_acceptance_length=None
                    if point.report["branching"] == 1
                    else float(point.report["acceptance_length"]),
                )
                for point in read_curve(self._directory, facts).points
            ),
            timeline=tuple(self._roles[name].timeline(name) for name in self._in_order()),
        )

    def _named(self) -> list[str]:
        try:
            names = sorted(path.stem for path in (self._directory / "events").glob("*.jsonl"))
        except OSError:
            return []
        return names[:FILES_MAX]

    def _in_order(self) -> list[str]:
        """The producers first, then the consumer and its ranks, then the others."""
        named = [name for name, role in self._roles.items() if role.spans]
        return sorted(named, key=lambda name: (not is_producer(name), not name.startswith(CONSUMER), name))

    def _train(self, events: Iterable[Mapping[str, Any]]) -> None:
        """A step that is trained again takes the place of all that followed it."""
        for event in events:
            figures = finite_numbers(event)
            if event.get("event") != "step" or not 0 < figures.get("step", 0) < STEPS_MAX:
                continue
            step = int(figures["step"])
            if self._steps and step <= next(reversed(self._steps)):
                self._steps = {number: point for number, point in self._steps.items() if number < step}
            self._steps[step] = TrainedPoint(
                step=step, loss=figures.get("loss"), acceptance_length=figures.get(ESTIMATE)
            )


class _Role:
    """A role's processes, one after the other. Events that are read twice change nothing."""

    def __init__(self, path: Path) -> None:
        self._events = AllEvents(path)
        self._known: dict[tuple[float, int | None], Span] = {}
        self._marks: dict[tuple[float, str], Mark] = {}
        self._now: Span | None = None
        self._is_live = False

    @property
    def spans(self) -> Sequence[Span]:
        return list(self._known.values())

    def look(self, is_live: bool) -> list[dict[str, Any]]:
        self._is_live = is_live
        events = self._events.read()
        for event in events:
            self._take(event)
        self._known = dict(list(self._known.items())[-SPANS_MAX:])
        self._marks = dict(list(self._marks.items())[-MARKS_MAX:])
        return events

    def timeline(self, name: str) -> RoleTimeline:
        spans = self.spans
        for place, span in enumerate(spans):
            if not span.ended and (place < len(spans) - 1 or not self._is_live):
                span.ended = "killed"
        return RoleTimeline(role=name, spans=tuple(spans), marks=tuple(self._marks.values()))

    def _take(self, event: Mapping[str, Any]) -> None:
        time, kind = finite_numbers(event).get("time"), str(event.get("event"))
        if time is None or not 0 < time < TIME_MAX:
            return
        if kind == "role_started" or self._now is None:
            pid = event.get("pid")
            key = (time, pid if isinstance(pid, int) else None)
            self._now = self._known.setdefault(key, Span(begin=time, end=time, pid=key[1]))
        self._now.end = max(self._now.end, time)
        if kind in ("role_ended", "error"):
            self._now.ended = "error" if kind == "error" else "stopped" if event.get("stopped") else "done"
            self._now.message = _plain(str(event.get("message", "")))
        elif self._now.ended == "killed":  # it was silent, and tells of itself again
            self._now.ended = ""
        if kind in MARKS:
            self._marks[time, kind] = Mark(time=time, event=kind, words=_words(kind, event))


def _words(kind: str, event: Mapping[str, Any]) -> str:
    told = {"step": event.get("step", "?"), "ranks": event.get("ranks", "?")}
    return _plain(MARKS[kind].format(**told))


def _plain(text: str) -> str:
    """Without what UTF-8 cannot say; a foreign file may hold it."""
    return text.encode(errors="replace").decode()


def _thinned(points: list[TrainedPoint]) -> list[TrainedPoint]:
    """At most POINTS_MAX, each the mean over equally many neighbours."""
    size = -(-len(points) // POINTS_MAX)
    if size <= 1:
        return points
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [
        TrainedPoint(
            step=group[-1].step,
            loss=_mean(point.loss for point in group),
            acceptance_length=_mean(point.acceptance_length for point in group),
        )
        for group in groups
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
