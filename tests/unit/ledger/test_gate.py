"""The lock of a role decides; what its file says of the holder only informs."""

from __future__ import annotations

import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from paceline import SQLiteMetadataStore
from paceline.cli.progress import describe
from paceline.errors import RunBusyError
from paceline.ledger.gate import UNKNOWN, RoleLock, live_holder
from paceline.roles.snapshot import take_snapshot


def test_the_holder_is_named_while_it_holds(tmp_path: Path) -> None:
    """By its process id, to whoever asks and to whoever is refused."""
    assert live_holder(tmp_path, "consumer") is None
    lock = RoleLock(tmp_path, "consumer")
    assert live_holder(tmp_path, "consumer") == os.getpid()
    with pytest.raises(RunBusyError, match=f"stop process {os.getpid()}"):
        RoleLock(tmp_path, "consumer")
    lock.release()
    assert live_holder(tmp_path, "consumer") is None


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff\xfe", b"17", b"17 00000000", b"\x001 2"])
def test_a_holder_that_cannot_be_read_is_unknown(tmp_path: Path, content: bytes) -> None:
    """The role is held all the same, and no other process is named instead."""
    lock = RoleLock(tmp_path, "consumer")
    (tmp_path / "consumer.lock").write_bytes(content)
    assert live_holder(tmp_path, "consumer") == UNKNOWN
    with pytest.raises(RunBusyError, match=r"process unknown.*stop its process"):
        RoleLock(tmp_path, "consumer")
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    told = StringIO()
    describe(Console(file=told, width=200), take_snapshot(tmp_path, store))
    assert "running, process unknown" in told.getvalue()
    assert "live" in told.getvalue()
    store.close()
    lock.release()
    assert live_holder(tmp_path, "consumer") is None
