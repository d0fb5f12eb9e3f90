"""A run's curve: the acceptance lengths of its measured checkpoints, in evaluations.jsonl. No torch.

Each line of the file is a point: which checkpoint was measured, under which conditions, and its report.
Points are compared only under the same conditions (prompts, lengths, guesses, dtype). Servers draft chains,
so the chain's acceptance length, 1 + accepted / cycles, decides which checkpoint is the best.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paceline.durable_files import replace_file
from paceline.ledger.facts import RENDERING_DATE
from paceline.regular_files import read_regular

FILE = "evaluations.jsonl"
FILE_BYTES_MAX = 1 << 26
WAY = (
    "prompts",
    "num_draft_tokens",
    "branching",
    "acceptance_length",
    "emitted_per_cycle",
)  # of each way to draft


@dataclass(frozen=True)
class Point:
    """One measured checkpoint.

    `began`: when its run began, so that the file of a run that was deleted is not taken for a new run's.
    `checkpoint`: its folder's name; `manifest`, `draft`: SHA-256 of its manifest and of its draft's file.
    `conditions`: digest of everything but the draft on which the figures depend. `report`: as in
    evaluation.json, without what depends on plain decoding if it was measured beside training. `every`: the
    run's evaluation.every_steps then. `left_out`: steps that were due before and
    could not be measured in time.
    """

    step: int
    began: str
    checkpoint: str
    manifest: str
    draft: str
    conditions: str
    report: Mapping[str, Any] = field(hash=False)
    every: int
    left_out: tuple[int, ...] = ()

    @property
    def acceptance_length(self) -> float:
        """Of the chain: 1 + accepted / cycles."""
        return float(self.report["chain"]["acceptance_length"])

    @property
    def told(self) -> str:
        """For people: the acceptance length of each way to draft."""
        chain = self.report["chain"]
        ways = [chain] if self.report["branching"] == 1 else [chain, self.report]
        return ", ".join(f"{way['acceptance_length']:.2f} ({shape(way)})" for way in ways)


def shape(way: Mapping[str, Any]) -> str:
    """ "chain of 3" or "tree of 7"."""
    return f"{'chain' if way['branching'] == 1 else 'tree'} of {way['num_draft_tokens']}"


@dataclass(frozen=True)
class Curve:
    """Points by step. Those of other conditions than the newest one's cannot be compared and are left out."""

    points: tuple[Point, ...] = ()

    @classmethod
    def of(cls, points: Iterable[Point]) -> Curve:
        """`points` as they were measured; a step that was measured twice counts as it was measured last."""
        known = list(points)
        conditions = known[-1].conditions if known else ""
        by_step = {point.step: point for point in known if point.conditions == conditions}
        return cls(tuple(by_step[step] for step in sorted(by_step)))

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None

    def best(self, among: Collection[str] | None = None) -> Point | None:
        """The point of the greatest acceptance length, the later one of equals; `among`: names of folders."""
        held = [point for point in self.points if among is None or point.checkpoint in among]
        return max(held, key=lambda point: (point.acceptance_length, point.step), default=None)

    def stands_still(self, evaluations: int, gain: float, after: int = 0) -> str:
        """Why more training may not help: the last `evaluations` points are not above the best one before by
        more than `gain`; "" if they are, or if there are too few. Points up to step `after` do not count."""
        lengths = [point.acceptance_length for point in self.points if point.step > after]
        before, last = lengths[:-evaluations], lengths[-evaluations:]
        if not before or max(last) > max(before) + gain:
            return ""
        return (
            f"acceptance length has not risen by more than {gain:g} in the last {len(last)} evaluations "
            f"({', '.join(f'{length:.2f}' for length in last)}; {max(before):.2f} before)"
        )


# -- the file ----------------------------------------------------------------------------------


def read_curve(directory: Path, facts: Mapping[str, Any]) -> Curve:
    """The curve of the run in `directory`: of the lines that are its points, if the file can be read at all.

    `facts`: of the run's ledger.
    """
    try:
        lines = _lines(directory / FILE)
    except OSError:
        return Curve()
    began = beginning_of(facts)
    return Curve.of(point for point in map(_point, lines) if point is not None and point.began == began)


def beginning_of(facts: Mapping[str, Any]) -> str:
    """When the run began, as its points tell it."""
    return str(facts.get(RENDERING_DATE) or "")


def record_point(directory: Path, point: Point) -> None:
    """Add a point, in the place of one of the same step and conditions. Raises OSError.

    The file is replaced as a whole, so after a crash or on a full disk it has the old points or the new ones
    too. Lines that are no points stay.
    """
    path = directory / FILE
    kept = [line for line in _lines(path) if not _is_replaced(line, point)]
    text = json.dumps(asdict(point), sort_keys=True)
    replace_file(path, "".join(f"{line}\n" for line in [*kept, text]).encode(errors="surrogateescape"))


def _lines(path: Path) -> list[str]:
    try:
        data = read_regular(path, FILE_BYTES_MAX)
    except FileNotFoundError:
        return []
    return [line for line in data.decode(errors="surrogateescape").split("\n") if line]


def _is_replaced(line: str, by: Point) -> bool:
    point = _point(line)
    same = (by.step, by.conditions, by.began)
    return point is not None and (point.step, point.conditions, point.began) == same


def _point(line: str) -> Point | None:
    try:
        values = json.loads(line)
        names = [values[name] for name in ("began", "checkpoint", "manifest", "draft", "conditions")]
        steps = (values["step"], values["every"], *values["left_out"])
        ways = (values["report"], values["report"]["chain"])
        sound = all(type(name) is str for name in names) and all(type(step) is int for step in steps)
        figures = [figure for way in ways for figure in (*map(way.__getitem__, WAY), *way["acceptance_rate"])]
        sound = sound and all(map(_is_number, figures))
        return Point(**{**values, "left_out": tuple(values["left_out"])}) if sound else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf  # type: ignore[arg-type]
