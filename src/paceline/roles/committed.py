"""Which of a run's kept answers bind: those of committed samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paceline.roles.snapshot import has_ledger, open_run


def committed_in(run: Path) -> Callable[[int], bool]:
    """Whether the run in this directory has committed the sample of an ordinal, as far as its log is settled.

    An answer is written before its sample is committed. One that was not may be of other settings, another
    target or other prompts than the run was bound to later. Without a ledger nothing was committed.
    """
    if not has_ledger(run):
        return lambda _: False
    view = open_run(run)
    settled, failed = view.snapshot().settled, view.failed()
    return lambda ordinal: ordinal < settled and ordinal not in failed
