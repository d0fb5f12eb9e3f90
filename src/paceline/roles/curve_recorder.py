"""Measures a checkpoint beside training, and records measured checkpoints in the run's curve.

The draft is held before it is measured, and its point is durable before any other draft is released:
whatever dies in between, the best draft on record is there, and the next measurement tidies up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from paceline.config.run import RunConfig
from paceline.crashpoints import reach
from paceline.evaluation.curve import Point, beginning_of, read_curve, record_point, shape
from paceline.evaluation.heldout import HeldOut
from paceline.evaluation.marked import MarkedAnswers, within_limits, write_marked
from paceline.ledger.facts import RENDERING_DATE
from paceline.ledger.records import CheckpointRecord
from paceline.ledger.view import LedgerView
from paceline.parts import parts_of
from paceline.roles.best_draft import best_held, held_drafts
from paceline.roles.draft import hold_newest
from paceline.roles.evaluation_schedule import marks_left_out
from paceline.roles.measured_draft import (
    Answers,
    MeasuredDraft,
    build_measured_draft,
    draft_ways,
    held_out_of,
    measure_held_out,
)
from paceline.roles.wire import Report, no_report
from paceline.training.checkpoint import Checkpoint
from paceline.training.learner import DRAFT

HOW = ("checkpoint_step", "dtype", "device", "prompts_file", "max_new_tokens", "prompts_set_aside")
COUNTED = (
    *("prompts", "identical", "num_draft_tokens", "branching", "tokens", "cycles", "emitted_per_cycle"),
    *("acceptance_length", "acceptance_length_interval", "acceptance_rate", "acceptance_rate_interval"),
)


def measure_beside(config: RunConfig, view: LedgerView, events: Report = no_report) -> Point:
    """Hold and measure the newest checkpoint without plain decoding, and record it.

    A draft that was measured before, bit for bit, is not measured again. Raises as `hold_newest` and
    `build_measured_draft` do; OSError if the point cannot be written.
    """
    checkpoint, record = hold_newest(config, view, (DRAFT,))
    reach("evaluation.held")
    facts = view.facts()
    measured = build_measured_draft(config, checkpoint, facts.get(RENDERING_DATE))
    held_out = held_out_of(config, measured)
    point = point_of((checkpoint, record), config, facts, measured, held_out)
    curve = read_curve(config.run.directory, facts)
    answers = Answers()
    known = [p for p in curve.points if (p.draft, p.conditions) == (point.draft, point.conditions)]
    if known:
        point = replace(point, report=known[0].report, left_out=known[0].left_out)
    else:
        report = measure_held_out(config, measured, held_out, with_plain=False, answers=answers)
        point = replace(point, report=_shortened(report))
    reach("evaluation.measured")
    if not known:
        keep_answers(config, point, answers, events)
    record_in_curve(config, facts, point)
    return point


def point_of(
    held: tuple[Checkpoint, CheckpointRecord],
    config: RunConfig,
    facts: Mapping[str, Any],
    measured: MeasuredDraft,
    held_out: HeldOut,
    report: Mapping[str, Any] | None = None,
) -> Point:
    """The point of a checkpoint whose draft is held, measured on the run's own held-out prompts."""
    (checkpoint, record), every = held, config.evaluation.every_steps
    conditions = [
        held_out.prompts,
        config.evaluation.max_new_tokens,
        measured.head.eos_token_ids,
        [asdict(way.drafting) for way in draft_ways(config, measured)],
        str(measured.dtype),
    ]
    return Point(
        step=record.step,
        began=beginning_of(facts),
        checkpoint=record.name,
        manifest=record.manifest_digest,
        draft=_digest(checkpoint),
        conditions=hashlib.sha256(json.dumps(conditions).encode()).hexdigest()[:16],
        report=_shortened(report or {}),
        every=every,
        left_out=marks_left_out(read_curve(config.run.directory, facts), every, record.step),
    )


def _digest(checkpoint: Checkpoint) -> str:
    """Of the draft's bytes; a draft in parts has another one than the same draft in one file."""
    digest = hashlib.sha256()
    for name in parts_of(DRAFT, checkpoint.files):
        digest.update(checkpoint.files[name])
    return digest.hexdigest()


def keep_answers(config: RunConfig, point: Point, answers: Answers, events: Report = no_report) -> None:
    """Keep the answers of this point's measurement in the place of an older one's.

    Before the point is recorded: a reader that sees the point finds them. They only illustrate it, so the
    measurement goes on without them if they cannot be written; `events` hears why.
    """
    ways, left_out = within_limits(answers.of_ways)
    reports = {"tree": point.report, "chain": point.report["chain"]}
    marked = MarkedAnswers(
        began=point.began,
        step=point.step,
        checkpoint=point.checkpoint,
        guesses={name: shape(reports[name]) for name in ways},
        ways=ways,
        left_out=left_out,
    )
    try:
        write_marked(config.run.directory, marked)
    except OSError as error:
        events("answers_not_kept", step=point.step, why=str(error))


def _shortened(report: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an evaluation's report that a point keeps."""
    kept = {name: report[name] for name in (*HOW, *COUNTED) if report.get(name) is not None}
    return {**kept, "chain": _shortened(report["chain"])} if "chain" in report else kept


def record_in_curve(config: RunConfig, facts: Mapping[str, Any], point: Point) -> None:
    """Record a point, then release every held draft but the best. Raises OSError, CheckpointError."""
    held = held_drafts(config)
    record_point(config.run.directory, point)
    reach("evaluation.recorded")
    best = best_held(read_curve(config.run.directory, facts), held)
    held.release({best.checkpoint} if best is not None else {point.checkpoint})
