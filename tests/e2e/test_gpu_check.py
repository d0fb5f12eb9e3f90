"""`make gpu` where there is no GPU: the script checks itself on the CPU and a tiny target."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def test_the_check_passes_on_the_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capture, loss, a run that is killed and resumes to the same weights, and the table of a step.

    In this process, so that only the run which is killed starts from nothing.
    """
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu"])
    code = runpy.run_path(str(SCRIPT))["main"]()
    told = capsys.readouterr().out
    assert code == 0, told
    assert "to the same weights, bit for bit" in told
    assert "tokens/s" in told
    assert "All is well on cpu" in told


def test_without_a_gpu_the_check_says_so() -> None:
    """It does not pass by checking nothing."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "There is no CUDA device here" in done.stdout
