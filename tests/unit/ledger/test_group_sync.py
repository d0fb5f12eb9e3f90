"""What waits for the disk together is synced together, and never taken for synced when it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.ledger.stores.sqlite.database import Database
from paceline.ledger.stores.sqlite.group_sync import GroupSync
from paceline.testing.samples import sample_ref


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
    threads = [
        threading.Thread(target=store.commit_samples, args=([sample_ref(n)],))
        for n, store in enumerate(stores)
    ]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    watcher = SQLiteMetadataStore(tmp_path / "ledger.db", durability="head")
    seen = watcher.lsn()
    while seen < len(stores):  # all have committed, none has returned
        seen = watcher.wait(seen, 60)
    assert all(thread.is_alive() for thread in threads)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert done == [1, 5]


def test_whoever_opens_the_ledger_alone_believes_no_note(tmp_path: Path) -> None:
    """A power failure may leave the note and take the changes it speaks of."""
    gate, syncs = tmp_path / "gate", []
    first = GroupSync(gate, lambda: syncs.append("first"))
    first.wait_for(7, lambda: 9)
    second = GroupSync(gate, lambda: syncs.append("second"))
    second.wait_for(9, lambda: 9)
    assert syncs == ["first"]  # somebody was there: the note holds
    first.close()
    second.close()
    GroupSync(gate, lambda: syncs.append("third")).wait_for(1, lambda: 1)
    assert syncs == ["first", "third"]


def test_a_killed_process_is_not_there_any_more(tmp_path: Path) -> None:
    """Its locks go with it, so its note is not believed and nobody waits for it."""
    gate = tmp_path / "gate"
    program = (
        "import os, sys; from pathlib import Path; "
        "from paceline.ledger.stores.sqlite.group_sync import GroupSync; "
        "group = GroupSync(Path(sys.argv[1]), lambda: None); group.wait_for(5, lambda: 5); "
        "group.wait_for(6, lambda: os.kill(os.getpid(), 9))"
    )
    assert subprocess.run([sys.executable, "-c", program, str(gate)], check=False).returncode == -9
    syncs: list[int] = []
    GroupSync(gate, lambda: syncs.append(os.getpid())).wait_for(5, lambda: 5)
    assert syncs == [os.getpid()]


def test_a_failed_sync_covers_nobody(tmp_path: Path) -> None:
    """Who waits behind it asks the disk himself."""
    outcomes = iter([OSError("injected"), None])

    def sync() -> None:
        if error := next(outcomes):
            raise error

    group = GroupSync(tmp_path / "gate", sync)
    with pytest.raises(OSError, match="injected"):
        group.wait_for(1, lambda: 1)
    group.wait_for(1, lambda: 1)
    assert next(outcomes, "none left") == "none left"
