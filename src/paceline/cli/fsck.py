"""`paceline fsck`: the checker on a run's live artefacts, as a readable verdict."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from paceline.fsck.checker import check

UNSOUND = 9  # exit code


def fsck_directory(console: Console, directory: Path) -> int:
    """Print what the checker finds in the run; 0 if the promise is kept, else UNSOUND."""
    report = check(directory)
    counted = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.counts.items())
    console.print(f"looked at {counted or 'what could be read'}", highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note   {note}", highlight=False, soft_wrap=True)
    for error in report.errors:
        console.print(f"ERROR  {error}", highlight=False, soft_wrap=True)
    if report.errors:
        console.print(
            f"UNSOUND: {len(report.errors)} errors. Nothing was changed. Keep a copy of {directory} before "
            "you go on; restore the ledger or the checkpoints named above from a backup.",
            highlight=False,
            soft_wrap=True,
        )
        return UNSOUND
    console.print(
        "sound: nothing lost, nothing twice, every checkpoint is what was recorded", highlight=False
    )
    return 0
