"""`paceline produce RUN --join`: what the command itself decides, before it becomes the role's process."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from paceline.cli import foreground
from paceline.cli.main import app
from paceline.config.load import load_run_config
from paceline.ledger.facts import COMPLETED_STEP
from paceline.testing.tiny_run import TinyRun


@pytest.mark.parametrize("completed", [None, 3])
def test_joining_a_complete_run_ends_well(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    completed: int | None,
) -> None:
    """What starts producers again and again, such as a cluster, is then done with it."""
    run = TinyRun(tmp_path, Path("model"))
    with closing(load_run_config(run.run_file).open_ledger()) as ledger:
        ledger.set_facts(None, {COMPLETED_STEP: completed})
    begun: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, __: begun.append(command))
    monkeypatch.setattr(foreground, "local_target", lambda target: target)
    assert not app(["produce", str(run.run_file), "--join"], standalone_mode=False)
    assert bool(begun) is (completed is None)
    assert ("needs no further producer" in capsys.readouterr().err) is (completed is not None)


def test_joining_a_run_that_has_not_begun_is_left_to_the_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what to do; nothing is made here."""
    run = TinyRun(tmp_path, Path("model"))
    begun: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, __: begun.append(command))
    monkeypatch.setattr(foreground, "local_target", lambda target: target)
    app(["produce", str(run.run_file), "--join"], standalone_mode=False)
    assert [command[-1] for command in begun] == ["--join"]
    assert not run.directory.exists()
