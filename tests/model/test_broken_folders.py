"""Under the checkpoints and the features: power failures, failing calls, flipped bits."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline import durable_files
from paceline.testing import broken_folders
from paceline.testing.broken_folders import FAULTS, fail_calls, lose_power
from paceline.testing.flipped_slots import flip_bits as flip_slots
from paceline.training import checkpoint


@pytest.mark.parametrize("seed", range(3))
def test_recorded_checkpoints_survive_power_loss(tmp_path: Path, seed: int) -> None:
    """After every file operation: what the ledger names is whole, what it does not is whole or ignored."""
    assert lose_power(tmp_path, seed, writes=6, per_step=4)["images"] > 250


def no_folder_sync(folder: Path) -> None:
    """Names may be lost."""


def no_file_sync(path: Path, data: bytes) -> None:
    fd = durable_files.os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    durable_files.os.write(fd, data)
    durable_files.os.close(fd)


def sweep_everything(
    self: checkpoint.CheckpointFolder, keep: set[str], *, epoch: int | None = None
) -> list[str]:
    names = [entry.name for entry in sorted(self.folder.iterdir())]
    for name in names:
        checkpoint.shutil.rmtree(self.folder / name)
    return names


BUGS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "names are not synced": (durable_files, "sync_folder", no_folder_sync),
    "bytes are not synced": (durable_files, "write_file", no_file_sync),
    "sweep removes what is recorded": (checkpoint.CheckpointFolder, "sweep", sweep_everything),
    "digests are not compared": (checkpoint, "_sha256", lambda _: "0" * 64),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_the_making_of_checkpoints_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    """Each planted one, by one of the checks here."""
    monkeypatch.setattr(*BUGS[bug])  # type: ignore[arg-type]

    def check() -> None:
        for seed in range(5):
            lose_power(tmp_path / str(seed), seed, writes=5, per_step=4)
            broken_folders.flip_bits(tmp_path / f"flips-{seed}", seed, flips=20)

    with pytest.raises((AssertionError, OSError)):
        check()


@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_failing_call_leaves_the_older_checkpoint(tmp_path: Path, number: int, call: str) -> None:
    """Whichever call fails: nothing half is taken for a checkpoint, and the next write works."""
    assert fail_calls(tmp_path, 1, number, calls=(call,))["faults"] >= 3


def test_no_flipped_bit_of_a_checkpoint_is_believed(tmp_path: Path) -> None:
    """Nor is such a folder adopted when no ledger names it."""
    assert sum(broken_folders.flip_bits(tmp_path, 1, flips=300).values()) == 300


def test_no_flipped_bit_of_shared_memory_is_trained(tmp_path: Path) -> None:
    """Missing, damaged, or exactly what was put."""
    counts = flip_slots(tmp_path / "features", 1, flips=300)
    assert counts["found in slot"] > 50
    assert sum(counts.values()) == 300
