"""A disk that fails: every error says what to do next."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.compat.streaming_channel import StreamingRefChannel
from paceline.errors import CheckpointError, LedgerError
from paceline.training.checkpoint import CheckpointFolder


def fails(_: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_checkpoint_folder_on_a_disk_that_fails_advises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CheckpointError, not a bare OSError."""
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CheckpointError) as error:
        CheckpointFolder(tmp_path / "checkpoints", "run0")
    assert error.value.next


@pytest.mark.parametrize("act", ["make", "mark", "close"])
def test_a_channel_on_a_disk_that_fails_advises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """LedgerError, whatever it was about to do."""
    channel = StreamingRefChannel(tmp_path / "refs")
    monkeypatch.setattr(os, "fsync", fails)
    acts: dict[str, Callable[[], object]] = {
        "make": lambda: StreamingRefChannel(tmp_path / "b" / "refs"),
        "mark": lambda: channel.mark_consumed(1),
        "close": channel.close,
    }
    with pytest.raises(LedgerError) as error:
        acts[act]()
    assert error.value.next
