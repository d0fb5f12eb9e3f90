"""Under checkpoints, replaced files and the ref channel: what a power failure leaves."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from paceline import durable_files
from paceline.testing import channel_history, checkpoint_history
from paceline.testing.file_images import images
from paceline.testing.recording_files import CODES, RecordedFiles, failing


@pytest.mark.parametrize("seed", range(10))
def test_recorded_checkpoints_survive_power_loss(memory: Path, seed: int) -> None:
    """From every image: records read bit for bit, the rest is whole or ignored, and a consumer goes on."""
    counts = checkpoint_history.lose_power(memory, seed, saves=4, per_point=1)
    assert counts["images"] > 50


def test_a_failed_sync_is_not_believed_later(memory: Path) -> None:
    """Whichever fsync fails, what was written under it never counts, even if the next fsync succeeds."""
    counts = checkpoint_history.fail_every_call(
        memory, 0, failing(CODES["EIO"]), kinds=("sync",), per_point=0
    )
    assert counts["faults"] >= 6
    assert counts["images"] > 100


@pytest.mark.parametrize("seed", range(12))
def test_published_refs_and_replaced_files_survive_power_loss(memory: Path, seed: int) -> None:
    """Refs are read in order and never torn; a replaced file has its old bytes or the new ones."""
    assert channel_history.lose_power(memory, seed, rounds=14, per_point=2)["images"] > 40


def contents(files: RecordedFiles, name: str) -> set[bytes | None]:
    """What it may hold now, in so many images that no kind of loss is missing by chance."""
    found = images(files.operations, random.Random(0), per_point=400, since=len(files.operations))
    return {image.tree.get(name) for image in found}


def test_the_recorder_loses_what_no_fsync_covers(memory: Path) -> None:
    """Bytes that were written, and names that were given, without a sync: lost, torn, zero or garbage."""
    whole = bytes(range(256)) * 40
    with RecordedFiles(memory).watching() as files:
        (memory / "folder").mkdir()
        durable_files.sync_folder(memory)
        fd = os.open(memory / "folder" / "a", os.O_CREAT | os.O_WRONLY)
        os.write(fd, whole)
        os.close(fd)
        left = contents(files, "folder/a")
        assert {None, b"", whole} < left
        torn = {len(content) for content in left if content} - {len(whole)}
        assert torn
        assert all(size % 512 == 0 for size in torn)
        assert any(content and len(content) == len(whole) and content != whole for content in left)
        durable_files.write_file(memory / "folder" / "b", whole)
        assert contents(files, "folder/b") == {None, whole}
        durable_files.sync_folder(memory / "folder")
        assert contents(files, "folder/b") == {whole}
        (memory / "folder" / "b").rename(memory / "folder" / "c")
        assert contents(files, "folder/b") == contents(files, "folder/c") == {None, whole}
        durable_files.replace_file(memory / "folder" / "c", b"new")
        assert contents(files, "folder/c") == {b"new"}


def test_the_recorder_notices_what_went_past_it(memory: Path) -> None:
    """A product that changes files by other calls than those recorded would prove nothing."""
    with (
        pytest.raises(AssertionError, match="past the recording"),
        RecordedFiles(memory).watching(),
    ):
        (memory / "unseen").write_bytes(b"x")
