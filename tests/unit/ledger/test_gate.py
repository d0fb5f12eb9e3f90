"""Locks: who holds a role, and what happens when the system refuses one of their calls."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cli.progress import describe
from paceline.errors import LedgerError, RunBusyError
from paceline.ledger.locks import UNKNOWN, RoleLock, live_holder
from paceline.ledger.stores.sqlite import SQLiteLedger
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
    ledger = SQLiteLedger(tmp_path / "ledger.db")
    told = StringIO()
    describe(Console(file=told, width=200), take_snapshot(tmp_path, ledger))
    assert "running, process unknown" in told.getvalue()
    assert "live" in told.getvalue()
    ledger.close()
    lock.release()
    assert live_holder(tmp_path, "consumer") is None


@pytest.mark.parametrize("plant", ["link", "fifo"])
def test_a_planted_lock_file_neither_hangs_nor_is_written(tmp_path: Path, plant: str) -> None:
    """A link leads to a file of its own choice: it is refused. A FIFO holds no look up."""
    victim = tmp_path / "precious"
    victim.write_text("precious")
    lock = tmp_path / "consumer.lock"
    if plant == "link":
        lock.symlink_to(victim)
        with pytest.raises(LedgerError, match="cannot be used"):
            RoleLock(tmp_path, "consumer")
    else:
        os.mkfifo(lock)
    assert live_holder(tmp_path, "consumer") is None
    assert victim.read_text() == "precious"


def test_a_ledgers_files_are_its_owners_alone(tmp_path: Path) -> None:
    """Database, log, gate and locks: prompts stand in reasons and ids."""
    ledger = SQLiteLedger(tmp_path / "ledger.db")
    ledger.set_facts(None, {"x": 1})
    lock = RoleLock(tmp_path, "consumer")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes) >= {"ledger.db", "ledger.db-wal", "ledger.db-gate", "consumer.lock"}
    assert set(modes.values()) == {0o600}, modes
    lock.release()
    ledger.close()


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
            ledger = SQLiteLedger(path)
        except LedgerError as error:
            refused += bool(error.next)
        else:
            for number in range(3):
                try:
                    ledger.set_facts(None, {f"fact-{number}": 1})
                    done += 1
                except LedgerError as error:
                    refused += bool(error.next)
            ledger.close()
        monkeypatch.setattr(fcntl, "flock", real)
        again = SQLiteLedger(path)
        assert len(again.facts()) == done
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
        SQLiteLedger(tmp_path / "ledger.db")
    with pytest.raises(LedgerError, match="ulimit"):
        RoleLock(tmp_path, "consumer")


def test_an_interruption_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, just when the gate has been taken: others must not wait for this process."""
    ledger, other = SQLiteLedger(tmp_path / "db"), SQLiteLedger(tmp_path / "db")
    real = fcntl.flock

    def interrupted(fd: int, how: int) -> None:
        real(fd, how)
        if how == fcntl.LOCK_EX:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.set_facts(None, {"x": 1})
    other.set_facts(None, {"x": 2})
    assert ledger.facts() == {"x": 2}


def test_a_lock_that_fails_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to stop a process because the kernel has no locks left."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "fcntl", refuse)
        with pytest.raises(LedgerError, match="No locks available"):
            RoleLock(tmp_path, "consumer")
    RoleLock(tmp_path, "consumer").release()
