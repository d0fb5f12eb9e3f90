"""Every file call of a checkpoint, a replaced file and the ref channel fails once, and for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.testing import channel_history, checkpoint_history
from paceline.testing.recording_files import CODES, failing


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_a_failing_call_leaves_the_older_checkpoints(memory: Path, code: str, lasting: bool) -> None:
    """CheckpointError with advice; nothing half-made counts; the next write in the same process succeeds."""
    counts = checkpoint_history.fail_every_call(memory, 1, failing(CODES[code]), lasting=lasting)
    assert counts["faults"] > 20


def test_a_short_write_is_completed(memory: Path) -> None:
    """The checkpoint is whole, whichever write was short."""
    assert checkpoint_history.fail_every_call(memory, 1, None, kinds=("write",))["faults"] >= 3


def test_writes_that_are_all_short_are_completed(memory: Path) -> None:
    """A disk that takes half of what it is given takes it all in the end."""
    counts = checkpoint_history.fail_every_call(memory, 1, None, kinds=("write",), lasting=True)
    assert counts["faults"] >= 3


@pytest.mark.parametrize("code", CODES)
def test_a_failing_call_tears_no_ref_and_no_replaced_file(memory: Path, code: str) -> None:
    """Old bytes or new ones, and published refs in order; both go on when the disk does."""
    assert channel_history.fail_every_call(memory, failing(CODES[code]))["faults"] > 15


def test_a_short_write_of_refs_is_never_read(memory: Path) -> None:
    """The channel refuses to go on, and readers skip the torn ref."""
    assert channel_history.fail_every_call(memory, None, kinds=("write",))["faults"] >= 3
