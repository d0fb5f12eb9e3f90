"""The evaluator process: `python -m paceline.roles.evaluator RUN.yaml`. It writes evaluation.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from paceline.durable_files import replace_file
from paceline.ledger.facts import RENDERING_DATE
from paceline.ledger.stores.sqlite.view import LedgerView
from paceline.roles.draft import newest_checkpoint
from paceline.roles.measured_draft import build_measured_draft, held_out_of, measure_held_out
from paceline.roles.plan import RunPlan
from paceline.roles.process import run_role
from paceline.roles.target_binding import refuse_other_target
from paceline.telemetry import EventLog
from paceline.training.torch_learner import DRAFT


def evaluate(plan: RunPlan, events: EventLog, should_stop: Callable[[], bool]) -> None:  # noqa: ARG001
    """Decode held-out prompts plainly and speculatively with the newest checkpoint's draft."""
    config = plan.config
    view = LedgerView(config.ledger_path)
    refuse_other_target(view, config)
    checkpoint = newest_checkpoint(config, view, only=(DRAFT,))
    measured = build_measured_draft(config, checkpoint, view.facts().get(RENDERING_DATE))
    result = measure_held_out(config, measured, held_out_of(config, measured))
    path = config.run.directory / "evaluation.json"
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    events.write("evaluated", **result)


if __name__ == "__main__":
    sys.exit(run_role("evaluator", Path(sys.argv[1]), evaluate, stops_itself=False))
