"""A verb that is given a run's folder knows its settings, and leaves nothing in it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from paceline.cli.named_run import run_file_of
from paceline.config.load import flat, load_run_config, parse_run_config
from paceline.errors import ConfigError
from paceline.ledger.facts import CONFIG
from paceline.ledger.place import opened
from paceline.ledger.settings import SqliteSection


def began(folder: Path, **changed: Any) -> None:
    """A run of which only the settings are known."""
    given = {
        "run": {"name": "r", "directory": str(folder)},
        "target": {"model": "models/m"},
        "prompts": {"path": "p.jsonl"},
        "evaluation": {"prompts": "h.jsonl"},
        "ledger": {"store": "redis", "url": "redis://cave:6379/0"},
    }
    ledger = opened(SqliteSection(durability="full"), folder, "r")
    ledger.set_facts(None, {CONFIG: {**flat(parse_run_config(given, source="run.yaml")), **changed}})
    ledger.close()


def test_the_ledger_may_have_moved_since_the_first_start(tmp_path: Path) -> None:
    """The recorded settings are those of the first start; ledger.json knows better."""
    began(tmp_path)
    assert load_run_config(run_file_of(tmp_path)).ledger == SqliteSection(durability="full")


def test_the_settings_are_a_file_for_children_and_no_file_of_the_run(tmp_path: Path) -> None:
    """Another process reads them while this one lives; the folder holds what it held, as old as it was."""
    began(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}
    run_file = run_file_of(tmp_path)
    read = subprocess.run(["/bin/cat", run_file], capture_output=True, text=True, check=True)
    assert "name: r\n" in read.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))} == before


def test_settings_of_another_version_are_named_by_their_run(tmp_path: Path) -> None:
    began(tmp_path, **{"training.magic": 3})
    with pytest.raises(ConfigError, match=rf"The settings that {tmp_path} has recorded.*magic") as raised:
        run_file_of(tmp_path)
    assert "/proc" not in str(raised.value)
