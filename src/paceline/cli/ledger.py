"""`paceline ledger copy`: a run's ledger moves to another store."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from paceline.cli.plain import say
from paceline.ledger.moving import move_ledger


def copy_run_ledger(console: Console, directory: Path, to: str) -> None:
    moved = move_ledger(directory, to)
    say(console, f"copied {moved.rows} rows and compared them: the run's ledger is now {moved.where}")
    say(console, f"{moved.before} stays as it is; the run does not use it any more.")
    say(console, f"Set ledger.store: {moved.store} in the run file (and ledger.url for a server).")
