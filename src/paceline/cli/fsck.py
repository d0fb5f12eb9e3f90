"""`paceline fsck`: runs the checker on a run and prints its verdict."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from paceline.cli.plain import say
from paceline.errors import ConfigError, SchemaError
from paceline.fsck.checker import check, check_view
from paceline.fsck.report import RULES, Report
from paceline.ledger.place import known
from paceline.ledger.settings import FILE
from paceline.regular_files import kind_of, open_regular
from paceline.roles.snapshot import open_run

UNSOUND = 9  # exit code


def fsck_directory(console: Console, directory: Path, mounted: Path | None = None) -> int:
    """Print what the checker finds in the run; returns 0 if it is sound, else UNSOUND.

    `mounted`: where this host has features that hosts share. Raises what `checked` raises.
    """
    report = checked(directory, mounted)
    counted = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.counts.items())
    say(console, f"looked at {counted or 'what could be read'}")
    for rule, promise in RULES.items():
        errors = report.errors_of(rule)
        # If nothing could be read, no rule was checked.
        if errors or report.counts:
            say(console, f"{rule} {f'{len(errors)} ERRORS' if errors else 'ok'}: {promise}")
        for error in errors:
            say(console, f"   ERROR {error}")
    for note in report.notes:
        say(console, f"note   {note}")
    if not report.errors:
        say(console, "sound: no sample is lost or trained twice, and every checkpoint is as recorded")
        return 0
    say(
        console,
        f"UNSOUND: {len(report.errors)} errors. Nothing was changed. {_advice(directory, report)}",
    )
    return UNSOUND


def checked(directory: Path, mounted: Path | None = None) -> Report:
    """What the checker finds in the run. `mounted`: see `fsck_directory`.

    Raises SchemaError for a ledger that is empty or of another version, ConfigError or OSError for files that
    this user may not read.
    """
    place = known(directory)
    if place is None or place.is_file:
        if not kind_of(directory / FILE):
            open_run(directory)  # raises the error with advice
        open_regular(directory / FILE).close()
        report = check(directory, mounted=mounted)
    else:
        report = check_view(place.view(directory), directory, mounted=mounted)
    if report.forbidden:
        raise ConfigError(
            f"{directory} was not checked completely: {report.forbidden}.",
            why="A file that cannot be read is neither sound nor damaged.",
            next="run the command as the user of the run.",
        )
    if report.unchecked:
        raise SchemaError(
            f"{directory} was not checked: {report.unchecked}.",
            why="Nothing was changed, and nothing in it was judged.",
            next="use the version of Paceline that wrote it; or start the run, if it has not begun.",
        )
    return report


def _advice(directory: Path, report: Report) -> str:
    if all(error.startswith("C5 ") for error in report.errors):
        if not report.is_resumable and report.newer:
            return (
                "The ledger is older than its checkpoints: those that it knows are gone, and newer ones lie "
                f"there ({', '.join(report.newer)}). Put back the ledger that belongs to them (ledger.db, "
                "and ledger.db-wal if there is one; or the server's data), or start a new run."
            )
        if not report.is_resumable:
            return (
                "The ledger is sound, but no checkpoint is whole, and `paceline train` does not start over, "
                "because it would train every sample again. Restore the checkpoints named above from a "
                "backup, or start a new run."
            )
        return (
            "The ledger is sound: restore the checkpoints named above from a backup, or run the same "
            "`paceline train` again, which goes on from the newest checkpoint that is whole."
        )
    if all(error.startswith("C10 ") for error in report.errors):
        return (
            "The run is sound: remove the folders named above from checkpoints/best. Training goes on "
            "without them, and an export then takes the best draft that is left, or the newest."
        )
    return (
        f"Keep a copy of {directory} before you go on; restore ledger and checkpoints from one backup, "
        "or start a new run."
    )
