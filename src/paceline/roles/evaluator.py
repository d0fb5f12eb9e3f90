"""The evaluator process: `python -m paceline.roles.evaluator RUN.yaml [REQUEST | beside]`.

Without a request (an EvaluationRequest as JSON) it measures the newest checkpoint on the run's held-out
prompts, writes evaluation.json and adds a point to the run's curve; `beside` training it adds a point alone.
With a request it writes the report that is asked for, and its picture; with a MarkRequest it marks the tokens
of training samples that the draft guesses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paceline.config.run import RunConfig
from paceline.durable_files import replace_file
from paceline.evaluation.curve import beginning_of
from paceline.evaluation.marked import keep_samples
from paceline.evaluation.picture import picture_of
from paceline.evaluation.settings import EvaluationRequest, MarkRequest
from paceline.evaluation.unfinished import Unfinished
from paceline.ledger.facts import RENDERING_DATE
from paceline.ledger.view import LedgerView
from paceline.roles.curve_recorder import keep_answers, measure_beside, point_of, record_in_curve
from paceline.roles.draft import checkpoint_of_step, hold_newest
from paceline.roles.evaluation_schedule import BESIDE
from paceline.roles.marked_samples import marked_sample
from paceline.roles.measured_draft import Answers, build_measured_draft, held_out_of, measure_held_out
from paceline.roles.plan import RunPlan
from paceline.roles.process import Work, run_role
from paceline.roles.suite_report import DEFINITION, INTERVALS, measure_suites, read_suites
from paceline.roles.target_binding import refuse_other_target
from paceline.telemetry import EventLog
from paceline.training.learner import DRAFT


def evaluate(
    plan: RunPlan,
    events: EventLog,
    should_stop: Callable[[], bool],  # noqa: ARG001 (what is measured is kept, prompt by prompt)
    request: str | None = None,
) -> None:
    """Decode prompts plainly and speculatively with a checkpoint's draft."""
    config = plan.config
    view = config.view_ledger()
    refuse_other_target(view, config)
    if request is not None:
        _evaluate_suites(config, view, events, EvaluationRequest.model_validate_json(request))
        return
    checkpoint, record = hold_newest(config, view, (DRAFT,))
    facts = view.facts()
    measured = build_measured_draft(config, checkpoint, facts.get(RENDERING_DATE))
    held_out = held_out_of(config, measured)
    answers = Answers()
    result = measure_held_out(
        config, measured, held_out, with_lookup=True, report=events.write, answers=answers
    )
    point = point_of((checkpoint, record), config, facts, measured, held_out, result)
    keep_answers(config, point, answers, events.write)
    _write(config.run.directory / "evaluation.json", {"began": beginning_of(facts), **result})
    told = {name: value for name, value in result.items() if name != "figures_of_prompts"}
    events.write("evaluated", **told)
    record_in_curve(config, facts, point)


def evaluate_beside(plan: RunPlan, events: EventLog, should_stop: Callable[[], bool]) -> None:  # noqa: ARG001
    """Measure the newest checkpoint while training goes on."""
    view = plan.config.view_ledger()
    refuse_other_target(view, plan.config)
    events.write("evaluated", **measure_beside(plan.config, view, events.write).report)


def mark_samples(
    plan: RunPlan,
    events: EventLog,
    should_stop: Callable[[], bool],  # noqa: ARG001
    request: MarkRequest,
) -> None:
    """Mark in the answers of training samples which tokens a draft guesses. The answers stay as they are."""
    config = plan.config
    view = config.view_ledger()
    refuse_other_target(view, config)
    checkpoint, record = checkpoint_of_step(config, view, request.step, only=(DRAFT,))
    facts = view.facts()
    measured = build_measured_draft(config, checkpoint, facts.get(RENDERING_DATE))
    marked = []
    for ordinal in request.ordinals:
        marked.append(marked_sample(config, measured, record.name, ordinal))
        told = {"prompts": len(marked), "of": len(request.ordinals), "what": "training samples"}
        events.write("measured", **told)
    keep_samples(config.run.directory, facts, marked)


def _evaluate_suites(
    config: RunConfig, view: LedgerView, events: EventLog, request: EvaluationRequest
) -> None:
    suites = read_suites(config, request)
    checkpoint, record = checkpoint_of_step(config, view, request.step, only=(DRAFT,))
    measured = build_measured_draft(config, checkpoint, view.facts().get(RENDERING_DATE))
    facts = {
        "run": config.run.name,
        "checkpoint_step": checkpoint.step,
        "checkpoint": record.manifest_digest,
        "dtype": str(measured.dtype),
        "device": measured.device.type,
        "threads": torch.get_num_threads(),
        "max_new_tokens": config.evaluation.max_new_tokens,
        "acceptance_length_is": DEFINITION,
        "intervals_are": INTERVALS,
    }
    # Figures of another tree or target would not be those of this evaluation.
    identity = {**facts, "evaluation": config.evaluation.model_dump(mode="json")}
    with Unfinished(config.run.directory / "evaluation-unfinished.jsonl", identity) as unfinished:
        parts = measure_suites(config, measured, suites, request.temperatures, unfinished, events.write)
        report = {**facts, "suites": parts}
        _write(request.report, report)
        replace_file(request.report.with_suffix(".svg"), picture_of(report).encode())
    events.write("evaluated_suites", step=checkpoint.step, report=str(request.report))


def _write(path: Path, report: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(report, indent=1) + "\n").encode())


def work_of(asked: str | None) -> Work:
    """What the process is asked to do by its argument."""
    if asked == BESIDE:
        return evaluate_beside
    if asked is not None and "ordinals" in json.loads(asked):
        return partial(mark_samples, request=MarkRequest.model_validate_json(asked))
    return partial(evaluate, request=asked)


if __name__ == "__main__":
    asked = sys.argv[2] if len(sys.argv) > 2 else None
    sys.exit(run_role("evaluator", Path(sys.argv[1]), work_of(asked), stops_itself=False))
