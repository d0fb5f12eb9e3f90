"""`make gpu` where there is no GPU: the script checks itself on the CPU and a tiny target."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.timeout(600)
def test_the_check_passes_on_the_cpu() -> None:
    """Capture, loss, a run that is killed and resumes to the same weights, and the table of a step."""
    done = _run("--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "to the same weights, bit for bit" in done.stdout
    assert "tokens/s" in done.stdout
    assert "All is well on cpu" in done.stdout


def test_without_a_gpu_the_check_says_so() -> None:
    """It does not pass by checking nothing."""
    done = _run()
    assert done.returncode == 1
    assert "There is no CUDA device here" in done.stdout
