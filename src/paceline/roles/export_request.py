"""What an export was asked for, and the run's note of what was exported. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from paceline.durable_files import replace_file
from paceline.errors import ConfigError
from paceline.exports.settings import ExportSection
from paceline.regular_files import read_regular
from paceline.run_report.document import RunReport

NOTE_BYTES_MAX, REPORT_BYTES_MAX = 1 << 20, 1 << 26


def note_path(directory: Path) -> Path:
    return directory / "exports.json"


def add_note(directory: Path, folder: Path, entry: dict[str, Any]) -> None:
    """Record an exported folder; the newest comes last. Raises OSError."""
    entries = {path: value for path, value in read_notes(directory).items() if path != str(folder)}
    text = json.dumps({**entries, str(folder): entry}, indent=1) + "\n"
    replace_file(note_path(directory), text.encode())


def read_notes(directory: Path) -> dict[str, dict[str, Any]]:
    """Entries by folder; {} if nothing was exported, or the note cannot be read."""
    try:
        found = json.loads(read_regular(note_path(directory), NOTE_BYTES_MAX))
        return {str(path): dict(entry) for path, entry in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def read_run_report(path: Path) -> RunReport:
    """What the command has written for the exporter. Raises OSError."""
    return msgspec.json.decode(read_regular(path, REPORT_BYTES_MAX), type=RunReport)


def requested(text: str) -> ExportSection:
    """The request in a role's argument. Raises ConfigError if it is empty."""
    request = ExportSection.model_validate_json(text)
    if not request.formats:
        raise ConfigError(
            "No export is asked for.",
            next="paceline export RUN --to vllm DIR, or name formats in the run file's export section.",
        )
    return request
