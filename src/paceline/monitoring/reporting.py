"""Makes a run's RunReport from its ledger, its events, its measurements and the checker's findings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paceline import __version__
from paceline.evaluation.curve import Point, shape
from paceline.fsck.report import RULES
from paceline.fsck.report import Report as Findings
from paceline.ledger.facts import CONFIG
from paceline.monitoring.history import HistoryReader, RunHistory
from paceline.monitoring.status import status_of
from paceline.roles.snapshot import RunSnapshot, open_run, take_snapshot
from paceline.roles.target_binding import MODEL, TOKENIZER
from paceline.run_report.document import (
    Check,
    Interval,
    MeasuredCheckpoint,
    MeasuredWay,
    RoleCost,
    Rule,
    RunReport,
)


def read_report(directory: Path, found: Findings | str) -> RunReport:
    """`found`: by the checker; or why it could not check. Raises PacelineError, OSError."""
    snapshot = take_snapshot(directory, open_run(directory))
    status, now = status_of(directory, snapshot), snapshot.ledger
    history = HistoryReader(directory).read(now.facts)
    recorded = now.facts.get(CONFIG)
    spans = [span for role in history.timeline for span in role.spans]
    return RunReport(
        version=__version__,
        time=status.time,
        run=status.run,
        directory=status.directory,
        state=status.state,
        error=status.error,
        steps=status.step.number,
        planned_steps=status.step.planned,
        loss=status.step.loss,
        losses=tuple((point.step, point.loss) for point in history.trained if point.loss is not None),
        restarts=status.restarts,
        samples={
            "committed": status.samples.committed,
            "trained": status.samples.trained,
            "provisional": status.samples.provisional,
            "quarantined": status.samples.quarantined,
            "failed": status.prompts.failed,
        },
        left_out={
            str(name): why for name, why in (*status.quarantined.items(), *status.failed_prompts.items())
        },
        checkpoint="" if now.head is None else f"{now.head.name}, manifest {now.head.manifest_digest}",
        plans="" if now.head is None else now.head.chain,
        measured=_measured(snapshot),
        best_step=None if snapshot.best is None else snapshot.best.step,
        check=_check(found),
        cost=tuple(_cost(history)),
        seconds=max(span.end for span in spans) - min(span.begin for span in spans) if spans else None,
        settings=dict(sorted(recorded.items())) if isinstance(recorded, dict) else {},
    )


def _measured(s: RunSnapshot) -> tuple[MeasuredCheckpoint, ...]:
    """The curve's points; of the checkpoint that was measured with plain decoding beside it, all figures."""
    conditions = {point.step: _conditions(point, s.ledger.facts) for point in s.curve.points}
    reports = {point.step: point.report for point in s.curve.points}
    step = s.evaluation.get("checkpoint_step")
    if isinstance(step, int):
        reports[step] = s.evaluation
    found = {step: _checkpoint(step, report, conditions.get(step, "")) for step, report in reports.items()}
    return tuple(found[step] for step in sorted(found))


def _conditions(point: Point, facts: Mapping[str, Any]) -> str:
    """With the target, which is the same for all points of a run, and another one in another run."""
    told = [point.conditions, facts.get(MODEL), facts.get(TOKENIZER)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _checkpoint(step: int, report: Mapping[str, Any], conditions: str) -> MeasuredCheckpoint:
    ways = [_way("draft", report["chain"])]
    if report["branching"] != 1:
        ways.append(_way("draft", report))
    if "lookup" in report:
        ways.append(_way("prompt lookup, no draft", report["lookup"]))
    longest, identical = report.get("max_new_tokens"), report.get("identical")
    return MeasuredCheckpoint(
        step=step,
        prompts=int(report["prompts"]),
        prompts_file=Path(str(report.get("prompts_file", "an unknown file"))).name,
        max_new_tokens=longest if isinstance(longest, int) else None,
        dtype=str(report.get("dtype")).removeprefix("torch."),
        device=str(report.get("device")),
        identical=identical if isinstance(identical, int) else None,
        conditions=conditions,
        ways=tuple(ways),
    )


def _way(name: str, way: Mapping[str, Any]) -> MeasuredWay:
    speed_up = way.get("speed_up")
    return MeasuredWay(
        name=name,
        guesses=shape(way),
        acceptance_length=float(way["acceptance_length"]),
        acceptance_length_interval=_interval(way, "acceptance_length"),
        emitted_per_cycle=float(way["emitted_per_cycle"]),
        acceptance_rate=_numbers(way.get("acceptance_rate")),
        speed_up=None if speed_up is None else float(speed_up),
        speed_up_interval=_interval(way, "speed_up"),
    )


def _numbers(values: object) -> tuple[float, ...]:
    """A file may hold anything."""
    known = values if isinstance(values, list | tuple) else ()
    return tuple(float(value) for value in known if isinstance(value, int | float))


def _interval(way: Mapping[str, Any], name: str) -> Interval:
    bounds = way.get(f"{name}_interval")
    if not isinstance(bounds, list | tuple) or [type(bound) for bound in bounds] != [float, float]:
        return None
    return bounds[0], bounds[1]


def _check(found: Findings | str) -> Check:
    if isinstance(found, str):
        return Check(sound=None, why=found)
    rules = tuple(
        Rule(name=name, promise=promise, errors=tuple(found.errors_of(name)))
        for name, promise in RULES.items()
    )
    notes = len(found.notes)
    return Check(sound=not found.errors, looked_at=dict(found.counts), rules=rules, notes=notes)


def _cost(history: RunHistory) -> Iterator[RoleCost]:
    for role in history.timeline:
        yield RoleCost(
            role=role.role,
            starts=len(role.spans),
            killed=sum(span.ended == "killed" for span in role.spans),
            seconds=sum(span.end - span.begin for span in role.spans),
        )
