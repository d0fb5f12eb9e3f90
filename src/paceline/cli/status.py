"""`paceline status`: what a run has done and is doing, for a person or for a script."""

from __future__ import annotations

from pathlib import Path

from paceline.cli.named_run import directory_of
from paceline.cli.plain import out, say, say_document
from paceline.cli.progress import describe
from paceline.monitoring.status import status_of
from paceline.roles.snapshot import making_sense, open_run, take_snapshot


def show_status(run: Path, *, as_json: bool) -> None:
    """Raises PacelineError."""
    directory = directory_of(run)
    with making_sense(directory):
        snapshot = take_snapshot(directory, open_run(directory))
        now = status_of(directory, snapshot)
    if as_json:
        say_document(now)
        return
    describe(out, snapshot)
    if now.waiting.words:
        say(out, now.waiting.words)
