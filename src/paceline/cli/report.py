"""`paceline report`: a run as one HTML file, or as the document that it is drawn from."""

from __future__ import annotations

from pathlib import Path

from paceline.cli.fsck import checked
from paceline.cli.named_run import directory_of, features_of
from paceline.cli.plain import out, say, say_document
from paceline.dashboard.report import ANSWERS_SHOWN, report_page
from paceline.durable_files import replace_file
from paceline.monitoring.reporting import read_report
from paceline.monitoring.texts import RunTexts
from paceline.roles.snapshot import making_sense, open_run


def write_report(run: Path, to: Path | None, *, as_json: bool) -> None:
    """`to`: the file; by default report.html in the run's directory. Raises PacelineError, OSError."""
    directory = directory_of(run)
    with making_sense(directory):
        report = read_report(directory, checked(directory, features_of(run)))
        if as_json:
            say_document(report)
            return
        facts = open_run(directory).facts()
        page = report_page(report, RunTexts(directory).of_measured(facts, ANSWERS_SHOWN))
    path = to or directory / "report.html"
    replace_file(path, page.encode(errors="replace"))
    say(out, f"report: {path}")
