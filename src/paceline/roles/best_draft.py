"""Chooses which draft a run gives away: the best that was measured, or else the newest. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paceline.config.run import RunConfig
from paceline.evaluation.curve import Curve, Point, read_curve
from paceline.ledger.records import CheckpointRecord
from paceline.training.held_drafts import HeldDrafts
from paceline.training.learner import DRAFT


@dataclass(frozen=True)
class Choice:
    """A checkpoint, its point if it was measured, and why it was chosen. `is_held`: read its held draft."""

    record: CheckpointRecord
    point: Point | None
    why: str
    is_held: bool


def held_drafts(config: RunConfig) -> HeldDrafts:
    return HeldDrafts(config.checkpoint_folder, config.run.name, DRAFT)


def best_held(curve: Curve, held: HeldDrafts) -> Point | None:
    """The best point whose draft is held. Raises OSError."""
    return curve.best(held.names())


def choose(config: RunConfig, newest: CheckpointRecord, facts: Mapping[str, Any]) -> Choice:
    """The best measured draft, unless the newest checkpoint is further than the curve reaches.

    `facts`: of the run's ledger. Raises OSError.
    """
    curve, held = read_curve(config.run.directory, facts), held_drafts(config)
    last, best = curve.last, best_held(curve, held)
    if last is None or best is None:
        return Choice(newest, None, "the newest; no checkpoint was measured", is_held=False)
    if newest.step - last.step > last.every:
        why = f"the newest; it was not measured, the last one that was is that of step {last.step}"
        return Choice(newest, None, why, is_held=False)
    return Choice(record_of(best), best, why_best(curve, best, newest), is_held=True)


def why_best(curve: Curve, best: Point, newest: CheckpointRecord) -> str:
    count = len(curve.points)
    told = f"acceptance length {best.told}"
    if count == 1:
        return f"the only one that was measured: {told}"
    last = curve.last
    beside = ""
    if last is not None and last.step != best.step:
        beside = f"; the last measured, step {last.step}: {last.told}"
    elif newest.step > best.step:
        beside = f"; step {newest.step}, the newest, was not measured"
    return f"the best of {count} evaluations: {told}{beside}"


def record_of(point: Point) -> CheckpointRecord:
    return CheckpointRecord(point.step, point.checkpoint, point.manifest)
