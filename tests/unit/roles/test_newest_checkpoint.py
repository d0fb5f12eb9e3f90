"""The checkpoint that is measured: the newest whole one, or a word of what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.errors import CheckpointError
from paceline.roles.draft import checkpoint_of_step, newest_checkpoint
from paceline.testing.run_by_hand import RunByHand


def test_damaged_checkpoints_are_not_called_missing(tmp_path: Path) -> None:
    """Of a complete run whose checkpoints are damaged, `train first` would be no advice."""
    run = RunByHand(tmp_path)
    config: Any = SimpleNamespace(
        checkpoint_folder=tmp_path / "checkpoints", run=SimpleNamespace(name="run0", directory=tmp_path)
    )
    with pytest.raises(CheckpointError, match="train first"):
        newest_checkpoint(config, run.ledger, ["weights.bin"])
    for _ in range(2):
        run.train(run.capture(2))
        run.checkpoint()
    assert newest_checkpoint(config, run.ledger, ["weights.bin"]).step == 2
    first, second = sorted((tmp_path / "checkpoints").iterdir())
    (second / "weights.bin").write_bytes(b"")
    assert newest_checkpoint(config, run.ledger, ["weights.bin"]).step == 1
    (first / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"weights.bin.*paceline fsck"):
        newest_checkpoint(config, run.ledger, ["weights.bin"])


def test_a_step_names_a_kept_checkpoint_or_the_error_says_which_are_kept(tmp_path: Path) -> None:
    """No other one is taken in its place."""
    run = RunByHand(tmp_path)
    config: Any = SimpleNamespace(
        checkpoint_folder=tmp_path / "checkpoints", run=SimpleNamespace(name="run0", directory=tmp_path)
    )
    for _ in range(2):
        run.train(run.capture(2))
        run.checkpoint()
    checkpoint, record = checkpoint_of_step(config, run.ledger, 1, ["weights.bin"])
    assert (checkpoint.step, record.step) == (1, 1)
    with pytest.raises(CheckpointError, match="keeps those of the steps 1, 2"):
        checkpoint_of_step(config, run.ledger, 9, ["weights.bin"])
