"""`paceline train`: both roles to the end of the run, then its evaluation and its exports."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import typer

from paceline.cli.export import write_exports
from paceline.cli.measure import measure
from paceline.cli.plain import INTERRUPTED, out, say
from paceline.cli.progress import Progress, trained
from paceline.cli.track import tracked
from paceline.config.load import load_run_config
from paceline.errors import ConfigError, PacelineError
from paceline.roles.child import RoleFailedError
from paceline.roles.plan import RunPlan, plan_run
from paceline.roles.preflight import preflight
from paceline.roles.process import die_with_supervisor
from paceline.roles.snapshot import open_run, take_snapshot
from paceline.roles.supervisor import Supervisor


def train_run(run_file: Path) -> None:
    """Raises typer.Exit if the user stopped it, PacelineError."""
    die_with_supervisor()  # where another process keeps this one going (placement/keeper.py)
    plan = plan_run(load_run_config(run_file))
    for note in [*plan.notes, *preflight(plan)]:
        say(out, note)
    with tracked(run_file, plan.config):
        _train(run_file, plan)


def _train(run_file: Path, plan: RunPlan) -> None:
    with Progress(out, plan) as progress:
        supervisor = Supervisor(run_file, plan, show=progress.show, tell=partial(say, out))
        completed = supervisor.run()
    if not completed:
        say(out, f"Stopped; nothing is lost. Go on with: paceline train {run_file}")
        raise typer.Exit(INTERRUPTED)
    failure = _measured_if_possible(run_file, plan)
    if plan.config.export.formats:
        write_exports(run_file, plan.config, plan.config.export)
    if failure is not None:
        raise failure


def _measured_if_possible(run_file: Path, plan: RunPlan) -> PacelineError | None:
    """Evaluate, or say why the draft is not measured. Returns the error with which training is to end.

    There is none if it is impossible, unless the run file asks for that. A draft that was not measured can
    still be exported.
    """
    if plan.evaluation_obstacle:
        _print_trained(plan, plan.evaluation_obstacle)
        return None
    try:
        measure(run_file, plan.config)
    except PacelineError as error:
        _print_trained(plan, error.what)
        skips = error.exit_code == ConfigError.exit_code and plan.config.evaluation.unsupported == "skip"
        return None if skips and isinstance(error, RoleFailedError) else error
    return None


def _print_trained(plan: RunPlan, why: str) -> None:
    snapshot = take_snapshot(plan.config.run.directory, open_run(plan.config.run.directory))
    say(out, f"not measured: {why} | {trained(snapshot)}")
