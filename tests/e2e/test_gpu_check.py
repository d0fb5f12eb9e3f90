"""`make gpu` where there is no GPU: the script checks itself on the CPU and a tiny target."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def test_the_check_passes_on_the_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each method: capture, loss, a run with its evaluation, and the table of a step; that of eagle3 is
    killed and resumes to the same weights."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu"])
    code = runpy.run_path(str(SCRIPT))["main"]()
    told = capsys.readouterr().out
    assert code == 0, told
    assert "to the same weights, bit for bit" in told
    for method in ("eagle3", "p-eagle", "dflash"):
        part = told[told.index(f"ok    {method}\n") :]
        assert "loss and gradients differ from the CPU's by 0.0e+00" in part
        assert "draft is evaluated on cpu" in part
        assert "tokens/s" in part
    assert "All is well on cpu" in told


def test_without_a_gpu_the_check_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not pass by checking nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert runpy.run_path(str(SCRIPT))["main"]() == 1
    assert "There is no CUDA device here" in capsys.readouterr().out
