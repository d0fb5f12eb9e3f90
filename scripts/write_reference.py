"""Writes what is generated in docs/: `python scripts/write_reference.py`. A test says when that is due."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paceline.cli.error_reference import error_tables
from paceline.cli.reference import command_tables
from paceline.config.reference import run_file_tables
from paceline.monitoring.reference import BEGIN, metrics_table, status_tables

DOCS = Path(__file__).parents[1] / "docs"
GENERATED: dict[str, Callable[[], str]] = {
    "cli.md": command_tables,
    "errors.md": error_tables,
    "metrics.md": metrics_table,
    "run-file.md": run_file_tables,
    "status.md": status_tables,
}


def written(name: str, write: Callable[[], str]) -> str:
    """The whole page: its own text, and the generated part after it."""
    return (DOCS / name).read_text().partition(BEGIN)[0] + BEGIN + "\n" + write()


if __name__ == "__main__":
    for name, write in GENERATED.items():
        (DOCS / name).write_text(written(name, write))
