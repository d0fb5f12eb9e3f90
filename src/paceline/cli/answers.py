"""`paceline data export`: a run's kept answers as a file."""

from __future__ import annotations

from pathlib import Path

import typer

from paceline.cli.named_run import run_file_of
from paceline.cli.plain import INTERRUPTED, out, say
from paceline.config.load import load_run_config
from paceline.roles.supervisor import export_answers_of
from paceline.target.hub import local_target


def export_answers(run: Path, to: Path | None) -> None:
    """Write them to the file `to`; by default answers.jsonl in the run's directory.

    Raises typer.Exit if the user stopped it, PacelineError.
    """
    run_file = run_file_of(run)
    config = load_run_config(run_file)
    local_target(config.target)  # that process does not use the network
    path = to or config.run.directory / "answers.jsonl"
    if not export_answers_of(run_file, config, path):
        say(out, f"Stopped; nothing is written. Again with: paceline data export {run}")
        raise typer.Exit(INTERRUPTED)
    say(out, f"answers: {path}")
