"""What waits for the disk together is synced together, and never taken for synced when it is not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.errors import LedgerError, SchemaError, UnknownResultError
from paceline.ledger.records import CheckpointRecord
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.ledger.stores.sqlite.database import Database
from paceline.ledger.stores.sqlite.group_sync import ANNOUNCED, UNKNOWN, Alone, GroupSync
from paceline.testing.samples import sample_ref


def fails(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "injected")


def opened(folder: Path, sync: Callable[[], None]) -> tuple[GroupSync, list[int]]:
    """One more who has the ledger open, and what it was told if it had to write the log again."""
    (folder / "ledger.db").touch()
    group, told = GroupSync(folder / "gate", sync), []
    with group.alone:
        group.enter(folder / "ledger.db", told.append)
    return group, told


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The newest change at the beginning of every sync."""
    done: list[int] = []
    sync = Database._sync_log

    def counted(self: SQLiteMetadataStore) -> None:
        done.append(self.lsn())
        sync(self)

    monkeypatch.setattr(Database, "_sync_log", counted)
    return done


def test_a_call_alone_syncs_what_it_committed(tmp_path: Path, syncs: list[int]) -> None:
    """One call, one sync; the change is in the log by then."""
    store = SQLiteMetadataStore(tmp_path / "ledger.db", durability="full")
    for number in range(3):
        store.commit_samples([sample_ref(number)])
    assert syncs == [1, 2, 3]


def test_a_call_that_nothing_durable_depends_on_syncs_nothing(tmp_path: Path, syncs: list[int]) -> None:
    """With durability "head" a commit is not synced, a taken role is, and the commit with it."""
    store = SQLiteMetadataStore(tmp_path / "ledger.db", durability="head")
    store.commit_samples([sample_ref(0)])
    assert syncs == []
    store.acquire_role("consumer", "test")
    assert syncs == [2]


def test_a_repeated_call_is_on_the_disk_when_it_returns(tmp_path: Path, syncs: list[int]) -> None:
    """Its first try may have died between the commit and the sync."""
    first = SQLiteMetadataStore(tmp_path / "ledger.db", durability="head")
    first.commit_samples([sample_ref(0)], op_id="lost answer")
    second = SQLiteMetadataStore(tmp_path / "ledger.db", durability="full")
    assert second.commit_samples([sample_ref(0)], op_id="lost answer") == [True]
    assert syncs == [1]


def test_calls_that_wait_meanwhile_share_the_next_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers are not held up by a sync, and all that committed during one are covered by the next."""
    done: list[int] = []
    begun, go_on = threading.Event(), threading.Event()
    sync = Database._sync_log

    def slow(self: SQLiteMetadataStore) -> None:
        done.append(self.lsn())
        begun.set()
        assert go_on.wait(60)
        sync(self)

    monkeypatch.setattr(Database, "_sync_log", slow)
    stores = [SQLiteMetadataStore(tmp_path / "ledger.db", durability="full") for _ in range(5)]
    watcher = SQLiteMetadataStore(tmp_path / "ledger.db", durability="head")
    threads = [
        threading.Thread(target=store.commit_samples, args=([sample_ref(n)],))
        for n, store in enumerate(stores)
    ]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    seen = watcher.lsn()
    while seen < len(stores):  # all have committed, none has returned
        seen = watcher.wait(seen, 60)
    while watcher._group_sync._said(ANNOUNCED) < len(stores):
        assert all(thread.is_alive() for thread in threads)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert done == [1, 5]


def test_whoever_opens_the_ledger_alone_believes_no_note(tmp_path: Path) -> None:
    """A power failure may leave the note and take the changes it speaks of."""
    syncs: list[str] = []
    first, told = opened(tmp_path, lambda: syncs.append("first"))
    assert told == [UNKNOWN]
    first.announce(9)
    first.wait_for(7)
    second, told = opened(tmp_path, lambda: syncs.append("second"))
    second.wait_for(9)
    assert (syncs, told) == (["first"], [])  # somebody was there: the note holds
    first.close()
    second.close()
    third, told = opened(tmp_path, lambda: syncs.append("third"))
    third.wait_for(1)
    assert (syncs, told) == (["first", "third"], [9])


def test_the_note_of_a_database_that_lay_there_before_is_not_believed(tmp_path: Path) -> None:
    """A copy was restored while somebody still has the old one open."""
    syncs: list[str] = []
    first, _ = opened(tmp_path, lambda: syncs.append("first"))
    first.announce(9)
    first.wait_for(7)
    (tmp_path / "copy").touch()
    (tmp_path / "copy").replace(tmp_path / "ledger.db")
    second, told = opened(tmp_path, lambda: syncs.append("second"))
    second.wait_for(1)
    first.wait_for(9)
    assert (syncs, told) == (["first", "second", "first"], [UNKNOWN])


@pytest.mark.parametrize("byte", range(20))
def test_a_damaged_note_is_not_believed(tmp_path: Path, byte: int) -> None:
    """Whoever waits syncs for himself."""
    syncs: list[str] = []
    first, _ = opened(tmp_path, lambda: syncs.append("first"))
    first.wait_for(7)
    note = bytearray((tmp_path / "gate").read_bytes())
    note[byte] ^= 64
    (tmp_path / "gate").write_bytes(note)
    first.wait_for(7)
    assert syncs == ["first", "first"]


@pytest.mark.parametrize(("where", "noted"), [("after it", 5), ("inside it", UNKNOWN)])
def test_a_killed_process_is_not_there_any_more(tmp_path: Path, where: str, noted: int) -> None:
    """Its locks go with it, so nobody waits for it; what it noted is believed by nobody who comes then, and a
    sync that it was inside of left no note."""
    program = (
        "import os, sys; from pathlib import Path; "
        "from paceline.ledger.stores.sqlite.group_sync import GroupSync; "
        "folder = Path(sys.argv[1]); (folder / 'ledger.db').touch(); "
        "group = GroupSync(folder / 'gate', lambda: None); group.enter(folder / 'ledger.db', print); "
        "group.wait_for(5); die = lambda: os.kill(os.getpid(), 9); "
    )
    program += "die()" if where == "after it" else "group._sync = die; group.wait_for(6)"
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    syncs: list[int] = []
    group, told = opened(tmp_path, lambda: syncs.append(os.getpid()))
    group.wait_for(5)
    assert (syncs, told) == ([os.getpid()], [noted])


def test_what_was_announced_in_an_earlier_life_is_not_believed(tmp_path: Path) -> None:
    """A power failure may have taken the change that somebody waited for."""
    syncs: list[str] = []
    first, _ = opened(tmp_path, lambda: syncs.append("first"))
    first.announce(9)
    first.close()
    second, _ = opened(tmp_path, lambda: syncs.append("second"))
    second.wait_for(7)
    second.wait_for(8)
    assert syncs == ["second", "second"]


def test_a_failed_sync_covers_nobody_and_vouches_for_nothing(tmp_path: Path) -> None:
    """Who has the log open asks the disk himself, and the kernel tells him. It would tell nobody who comes
    later, so whoever does writes the log again, though he is not alone."""
    syncs: list[str] = []
    first, _ = opened(tmp_path, fails)
    second, _ = opened(tmp_path, lambda: syncs.append("second"))
    second.wait_for(1)
    with pytest.raises(OSError, match="injected"):
        first.wait_for(2)
    third, told = opened(tmp_path, lambda: syncs.append("third"))
    assert told == [UNKNOWN]
    second.wait_for(2)
    third.wait_for(2)
    assert syncs == ["second", "second"]


def test_a_log_that_nobody_vouches_for_is_written_again(tmp_path: Path) -> None:
    """Its pages may be in memory only, and taken for clean: the content goes into the database instead."""
    first = SQLiteMetadataStore(tmp_path / "ledger.db", durability="head")
    first.commit_samples([sample_ref(0)])
    log = tmp_path / "ledger.db-wal"
    SQLiteMetadataStore(tmp_path / "ledger.db").close()
    assert log.stat().st_size > 0  # somebody was there, and nothing had failed
    first._group_sync._note(UNKNOWN)
    second = SQLiteMetadataStore(tmp_path / "ledger.db")
    assert log.stat().st_size == 0
    second.commit_samples([sample_ref(1)])
    assert first.committed_count() == second.committed_count() == 2


def test_a_log_that_nobody_vouches_for_and_somebody_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is believed that cannot be written again."""
    store = SQLiteMetadataStore(tmp_path / "ledger.db", durability="head")
    store.commit_samples([sample_ref(0)])
    store._group_sync._note(UNKNOWN)
    monkeypatch.setattr("paceline.ledger.stores.sqlite.database.BUSY_MS", 0)
    store._db.execute("BEGIN")
    list(store._db.execute("SELECT * FROM sample"))
    with pytest.raises(LedgerError, match="stop every process"):
        SQLiteMetadataStore(tmp_path / "ledger.db")
    store._db.execute("COMMIT")
    SQLiteMetadataStore(tmp_path / "ledger.db").close()


def test_nothing_is_freed_after_a_failed_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head that covers it may not be on the disk."""
    store = SQLiteMetadataStore(tmp_path / "ledger.db", durability="head")
    store.commit_samples([sample_ref(0)])
    store.record_train_ack(["run0:s0"], global_step=1, optimizer_durable=False)
    monkeypatch.setattr(store._group_sync, "_sync", fails)
    with pytest.raises(UnknownResultError):
        store.record_checkpoint(CheckpointRecord(1, "step-1", "digest", 1))
    with pytest.raises(LedgerError, match="stopped writing"):
        store.begin_release(9)
    with pytest.raises(LedgerError, match="stopped writing"):
        store.durable_marker()


def test_synced_changes_that_are_gone_are_missed(tmp_path: Path) -> None:
    """A flipped bit ends the log where it is, and SQLite takes the rest for never written."""
    program = (
        "import os, sys; from paceline.ledger.stores.sqlite import SQLiteMetadataStore as Store; "
        "from paceline.testing.samples import sample_ref; store = Store(sys.argv[1], durability='full'); "
        "[store.commit_samples([sample_ref(n)]) for n in range(3)]; os.kill(os.getpid(), 9)"
    )
    ledger = tmp_path / "ledger.db"
    assert subprocess.run([sys.executable, "-c", program, str(ledger)], check=False).returncode == -9
    log = bytearray((tmp_path / "ledger.db-wal").read_bytes())
    log[-1] ^= 1
    (tmp_path / "ledger.db-wal").write_bytes(log)
    with pytest.raises(SchemaError, match="ends at change 2, but change 3 was on the disk"):
        SQLiteMetadataStore(ledger)
    (tmp_path / "ledger.db-gate").unlink()
    store = SQLiteMetadataStore(ledger)
    assert store.committed_count() == 2


def test_a_second_store_of_a_process_leaves_the_locks_of_the_first(tmp_path: Path) -> None:
    """Closing a file that was opened by hand would drop them all; then an older SQLite that only looks takes
    the ledger for unused, and removes the log."""
    stores = [SQLiteMetadataStore(tmp_path / "ledger.db") for _ in range(2)]
    inode = (tmp_path / "ledger.db").stat().st_ino
    held = [line for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line]
    assert any("POSIX" in line for line in held), held
    assert stores[0].commit_samples([sample_ref(0)]) == [True]


def test_a_store_that_is_closed_says_so(tmp_path: Path) -> None:
    """Whether it is read or written; closing it again is no error."""
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    store.close()
    store.close()
    for call in (store.facts, lambda: store.set_facts({"a": 1})):
        with pytest.raises(LedgerError, match="is closed"):
            call()


@pytest.mark.parametrize("call", ["open", "posix_fallocate"])
def test_a_gate_file_that_cannot_be_opened_advises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A full disk is told here: later, whoever wrote the note would be killed."""
    monkeypatch.setattr(f"paceline.ledger.stores.sqlite.group_sync.os.{call}", fails)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(LedgerError, match="check the disk"):
        SQLiteMetadataStore(tmp_path / "ledger.db")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_an_error_of_the_lock_for_a_sync_advises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had been committed by then is called unknown."""
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    monkeypatch.setattr(Alone, "__enter__", fails)
    with pytest.raises(UnknownResultError, match="check the disk"):
        store.commit_samples([sample_ref(0)])
