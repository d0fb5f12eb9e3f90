"""`paceline demo` shows what it claims, and may itself be interrupted."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from paceline.demo.runs import KILLED, TARGET, prepare
from paceline.telemetry import read_events
from paceline.testing.tiny_run import TinyRun


def test_the_demo_kills_a_consumer_and_ends_in_the_same_weights(tmp_path: Path, tiny_model: Path) -> None:
    """A demo that has begun goes on with the prompts and the target that it has; here they are smaller."""
    folder = tmp_path / "paceline-demo"
    prepare(folder, prompts=32)
    shutil.copytree(tiny_model, folder / TARGET)
    command = [sys.executable, "-m", "paceline", "demo", str(folder)]
    shown = TinyRun.execute(command, {**os.environ, "COLUMNS": "200"})
    assert shown.returncode == 0, shown.stderr
    assert "was killed after step" in shown.stdout
    assert "the same weights, bit for bit" in shown.stdout
    assert "sound: no sample is lost or trained twice" in shown.stdout
    starts = [
        e for e in read_events(folder / KILLED / "events" / "consumer.jsonl") if e["event"] == "resumed"
    ]
    assert len(starts) == 1
    again = TinyRun.execute(command, dict(os.environ))
    assert again.returncode == 0, again.stderr
    assert "nothing was killed: the run was over before" in again.stdout
