"""Locks and bells: who holds a role, and what happens when the system refuses one of their calls."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from paceline import SQLiteMetadataStore
from paceline.cli.progress import describe
from paceline.errors import LedgerError, RunBusyError
from paceline.ledger.gate import IN_THE_DOOR, UNKNOWN, RoleLock, is_locked, live_holder
from paceline.ledger.stores.sqlite.group_sync import SYNC_LOCK
from paceline.roles.snapshot import take_snapshot
from paceline.testing.samples import sample_ref


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


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOLCK])
def test_a_gate_that_fails_lets_nothing_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, lasting: bool
) -> None:
    """Whichever lock of the gate fails: advice, and the ledger holds the calls that returned, no other."""
    real = fcntl.flock
    for turn in itertools.count(1):
        met = itertools.count(1)

        def flock(fd: int, how: int, turn: int = turn, met: itertools.count[int] = met) -> None:
            if how == fcntl.LOCK_EX and (n := next(met)) >= turn and (lasting or n == turn):
                raise OSError(code, os.strerror(code))
            real(fd, how)

        path, done, refused = tmp_path / f"{turn}" / "ledger.db", 0, 0
        monkeypatch.setattr(fcntl, "flock", flock)
        try:
            store = SQLiteMetadataStore(path)
        except LedgerError as error:
            refused += bool(error.next)
        else:
            for number in range(3):
                try:
                    done += store.commit_sample(sample_ref(number))
                except LedgerError as error:
                    refused += bool(error.next)
            store.close()
        monkeypatch.setattr(fcntl, "flock", real)
        again = SQLiteMetadataStore(path)
        assert again.committed_count() == done
        again.close()
        if not refused:
            break
    assert turn == 5


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_a_lock_file_that_cannot_be_opened_advises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Of the writers' gate and of a role; no descriptor stays behind."""
    real = os.open

    def refuse(path: str | Path, *args: int, **kwargs: int) -> int:
        if Path(path).suffix == ".lock" or Path(path).name.endswith("-gate"):
            raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LedgerError, match="ulimit"):
        SQLiteMetadataStore(tmp_path / "ledger.db")
    with pytest.raises(LedgerError, match="ulimit"):
        RoleLock(tmp_path, "consumer")


@pytest.mark.parametrize("lock", ["door", "gate", "sync"])
def test_an_interruption_leaves_no_lock_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    """Ctrl-C in a notebook, just when the lock has been taken: others must not wait for this process."""
    store, other = SQLiteMetadataStore(tmp_path / "db"), SQLiteMetadataStore(tmp_path / "db")
    call = "flock" if lock == "gate" else "fcntl"
    wanted = {"door": IN_THE_DOOR, "gate": fcntl.LOCK_EX, "sync": SYNC_LOCK}[lock]
    real = getattr(fcntl, call)

    def interrupted(fd: int, *how: object) -> object:
        taken = real(fd, *how)
        if how[-1] == wanted:
            raise KeyboardInterrupt
        return taken

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.commit_sample(sample_ref(0))
    assert not is_locked(other._gate._fd, IN_THE_DOOR)
    assert not is_locked(other._group_sync.alone.fd, SYNC_LOCK)
    fcntl.flock(other._gate._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_fails_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to stop a process because the kernel has no locks left."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "fcntl", refuse)
        with pytest.raises(LedgerError, match="No locks available"):
            RoleLock(tmp_path, "consumer")
    RoleLock(tmp_path, "consumer").release()


def test_a_call_that_cannot_ring_is_done_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is committed; who waits looks again. Who cannot hang up a bell is told what to do."""
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    real = os.open

    def refuse(path: str | Path, *args: int, **kwargs: int) -> int:
        if Path(path).suffix in (".fifo", ".new"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *args, **kwargs)

    with store._bell.listen(), monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        assert store.commit_sample(sample_ref(0)) is True
        with pytest.raises(LedgerError, match="ulimit"):
            store.wait(store.lsn(), 1.0)
    assert SQLiteMetadataStore(tmp_path / "ledger.db").committed_count() == 1
