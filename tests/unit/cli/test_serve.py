"""The command that serves a run's export comes from the run's note, or an error says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.cli.export import serving_command
from paceline.cli.options import HOST
from paceline.errors import ConfigError
from paceline.roles.export_request import add_note

ENTRY = {"format": "vllm", "step": 7, "target": "org/tiny", "revision": "abc", "method": "eagle3", "chain": 3}


def test_the_newest_export_is_served_at_the_commit_of_its_target(tmp_path: Path) -> None:
    """One that has no commit is served by its name alone."""
    add_note(tmp_path, tmp_path, ENTRY)
    assert serving_command(tmp_path, None, None, HOST)[:5] == [
        "vllm",
        "serve",
        "org/tiny",
        "--revision",
        "abc",
    ]
    add_note(tmp_path, tmp_path, {**ENTRY, "revision": ""})
    assert "--revision" not in serving_command(tmp_path, None, None, HOST)


@pytest.mark.parametrize(
    "note", ['{"HERE": {"format": "vllm", "step": 7}}', '{"HERE": 7}', "[1]", "not JSON"]
)
def test_a_note_of_another_version_is_called_that(tmp_path: Path, note: str) -> None:
    """The run has an export; it is not said that it has none."""
    (tmp_path / "exports.json").write_text(note.replace("HERE", str(tmp_path)))
    with pytest.raises(ConfigError, match="not what this version") as caught:
        serving_command(tmp_path, None, None, HOST)
    assert "paceline export" in caught.value.next


def test_a_run_without_an_export_is_told_so(tmp_path: Path) -> None:
    """Also if the folder was removed, or is for another server."""
    with pytest.raises(ConfigError, match="has no export"):
        serving_command(tmp_path, None, None, HOST)
    for entry in ({str(tmp_path / "removed"): ENTRY}, {str(tmp_path): ENTRY}):
        (tmp_path / "exports.json").write_text(json.dumps(entry))
        with pytest.raises(ConfigError, match="has no export"):
            serving_command(tmp_path, "sglang", None, HOST)
