"""The demo's folder is made whole or not at all, and is nobody else's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.config.load import load_run_config
from paceline.demo.runs import CALM, KILLED, prepare
from paceline.errors import ConfigError


def test_a_folder_that_is_not_of_a_demo_is_refused(tmp_path: Path) -> None:
    """Nothing in it is touched."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not of a demo"):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_a_killed_start_left_is_made_whole(tmp_path: Path) -> None:
    (tmp_path / "demo.unfinished").mkdir()
    (tmp_path / "demo.unfinished" / "prompts.jsonl").write_text("half a li")
    files = prepare(tmp_path / "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    lines = (tmp_path / "demo" / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(set(prompts)) == len(prompts) == 96
    assert prepare(tmp_path / "demo") == files


def test_a_demo_that_was_moved_is_refused_and_not_gone_on_with_elsewhere(tmp_path: Path) -> None:
    """Its run files hold the old place's paths; by another path to the same place it goes on."""
    prepare(tmp_path / "demo")
    (tmp_path / "link").symlink_to(tmp_path / "demo")
    prepare(tmp_path / "link")
    (tmp_path / "demo").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=f"was made as {tmp_path / 'demo'}, and was moved since"):
        prepare(tmp_path / "moved")


def test_both_runs_have_the_same_settings(tmp_path: Path) -> None:
    """So their weights may be compared; they differ in name and folder, which decide no bit."""
    calm, killed = (load_run_config(path) for path in (prepare(tmp_path / "demo")[n] for n in (CALM, KILLED)))
    assert calm.run != killed.run
    assert calm.model_copy(update={"run": killed.run}) == killed
