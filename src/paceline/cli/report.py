"""`paceline report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path

from paceline.cli.fsck import checked
from paceline.cli.named_run import directory_of
from paceline.cli.plain import out, say
from paceline.dashboard.report import report_page
from paceline.durable_files import replace_file
from paceline.monitoring.history import HistoryReader
from paceline.monitoring.status import status_of
from paceline.roles.snapshot import making_sense, open_run, take_snapshot


def write_report(run: Path, to: Path | None) -> None:
    """`to`: the file; by default report.html in the run's directory. Raises PacelineError, OSError."""
    directory = directory_of(run)
    with making_sense(directory):
        snapshot = take_snapshot(directory, open_run(directory))
        page = report_page(
            status_of(directory, snapshot),
            snapshot.ledger,
            HistoryReader(directory).read(snapshot.ledger.facts),
            snapshot.evaluation,
            checked(directory),
        )
    path = to or directory / "report.html"
    replace_file(path, page.encode(errors="replace"))
    say(out, f"report: {path}")
