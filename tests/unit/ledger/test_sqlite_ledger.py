"""What is particular to the SQLite store: versions, identity, disks, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from paceline import mounts
from paceline.errors import ConfigError, LedgerError, SchemaError, UnknownResultError
from paceline.ledger import filesystem
from paceline.ledger.stores.sqlite import SQLiteLedger, check_sqlite_version
from paceline.testing.ledger_calls import Training, capture, consumer_of, producer_of


@pytest.mark.parametrize("version", ["3.40.1", "3.44.5", "3.45.9", "3.50.6", "3.51.2"])
def test_a_sqlite_with_the_wal_reset_bug_is_refused(version: str) -> None:
    """Versions below the fix corrupt a log that two processes write."""
    with pytest.raises(SchemaError, match="apsw"):
        check_sqlite_version(version)


@pytest.mark.parametrize("version", ["3.44.6", "3.50.7", "3.51.3", "3.53.0", "3.54.1"])
def test_a_fixed_sqlite_is_taken(version: str) -> None:
    """The fix and its backports pass."""
    check_sqlite_version(version)


def test_a_network_filesystem_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WAL does not work over a network, and the error says where to go."""
    monkeypatch.setattr(filesystem, "filesystem_of", lambda _: "nfs4")
    with pytest.raises(ConfigError, match=r"nfs4.*local disk"):
        SQLiteLedger(tmp_path / "db")


def test_the_filesystem_of_a_folder_is_found() -> None:
    """/proc is a filesystem everyone knows the name of."""
    assert mounts.filesystem_of(Path("/proc/self")) == "proc"


MOUNTED = r"""22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:40 / /mnt/a\040b rw - {kind} host:/share rw
24 23 8:2 / /mnt/a\040b/disk rw - xfs /dev/sdb rw
"""


@pytest.mark.parametrize(
    "kind",
    [
        *("nfs4", "cephfs-of-nobody", "virtiofs", "wekafs", "gfs2", "ocfs2", "lustre"),
        *("fuse.juicefs", "fuse.ceph-fuse", "fuse.sshfs", "xfs"),
    ],
)
def test_a_filesystem_that_other_hosts_may_have_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By its type, as the kernel names it; that of the deepest mount counts."""
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_text(MOUNTED.format(kind=kind))
    assert mounts.is_on_network(Path("/mnt/a b/features")) == (kind not in ("cephfs-of-nobody", "xfs"))
    assert not mounts.is_on_network(Path("/mnt/a b/disk/features"))
    assert not mounts.is_on_network(Path("/mnt/a"))
    assert mounts.mount_of(Path("/mnt/a b/features/none")) == ("/mnt/a b/", kind)


def test_a_newer_schema_is_refused_and_untouched(tmp_path: Path) -> None:
    """A database of a newer version is not guessed at."""
    path = tmp_path / "db"
    SQLiteLedger(path).close()
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(SchemaError, match=r"99.*upgrade"):
        SQLiteLedger(path)


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    """Pointing the run at some other database must not write into it."""
    path = tmp_path / "db"
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE precious (x)")
    connection.close()
    with pytest.raises(SchemaError, match="another program"):
        SQLiteLedger(path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """Garbage is reported, not overwritten."""
    path = tmp_path / "db"
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 100)
    with pytest.raises(SchemaError, match="not a database"):
        SQLiteLedger(path)
    assert path.read_bytes().startswith(b"not a database")


def facts_of(count: int, size: int = 1000) -> dict[str, str]:
    return {f"fact-{n}": "x" * size for n in range(count)}


def test_a_full_disk_rolls_back_and_advises(tmp_path: Path) -> None:
    """What was committed stays, the failed change is gone whole, and the ledger goes on."""
    ledger = SQLiteLedger(tmp_path / "db")
    ledger.set_facts(None, {"a": 1})
    ledger._db.execute(f"PRAGMA max_page_count={ledger._value('PRAGMA page_count')}")
    with pytest.raises(LedgerError, match="free space"):
        ledger.set_facts(None, facts_of(500))
    assert ledger.facts() == {"a": 1}
    ledger._db.execute("PRAGMA max_page_count=1000000")
    ledger.set_facts(None, {"b": 2})
    assert ledger.facts() == {"a": 1, "b": 2}


def test_a_closed_ledger_says_so(tmp_path: Path) -> None:
    """Use after close is an error with advice, not a crash."""
    ledger = SQLiteLedger(tmp_path / "db")
    ledger.close()
    for use in (ledger.snapshot, ledger.facts, lambda: ledger.set_facts(None, {"x": 1})):
        with pytest.raises(LedgerError, match="closed"):
            use()


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_a_path_that_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """Opening a FIFO would wait for ever."""
    path = tmp_path / "db"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(LedgerError) as refused:
        SQLiteLedger(path)
    assert refused.value.next


COMMIT_AND_DIE = """
import sys
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.kill_points import arm
ledger = SQLiteLedger(sys.argv[1])
arm(sys.argv[2])
ledger.set_facts(None, {"a": 1})
ledger.set_facts(None, {"b": 1, "c": 1})
"""


@pytest.mark.parametrize(
    ("point", "survive"),
    [("ledger.before_commit:2", 1), ("ledger.after_commit:2", 3), ("ledger.after_commit:1", 1)],
)
def test_a_kill_leaves_whole_transactions(tmp_path: Path, point: str, survive: int) -> None:
    """SIGKILL before the commit loses the change whole, after it keeps it whole."""
    path = tmp_path / "db"
    died = subprocess.run([sys.executable, "-c", COMMIT_AND_DIE, str(path), point], check=False)
    assert died.returncode == -9
    ledger = SQLiteLedger(path)
    assert len(ledger.facts()) == survive
    ledger.set_facts(None, {"d": 1})


WAIT_FOR_CHANGE = """
import sys
from paceline.ledger.stores.sqlite import SQLiteLedger
ledger = SQLiteLedger(sys.argv[1])
seen = ledger.lsn()
print("ready", flush=True)
print(ledger.wait(seen, timeout_s=60.0) - seen, flush=True)
"""


def test_a_commit_wakes_a_waiter_in_another_process(tmp_path: Path) -> None:
    """The log number is looked at every few milliseconds, while somebody waits."""
    path = tmp_path / "db"
    ledger = SQLiteLedger(path)
    with subprocess.Popen(
        [sys.executable, "-c", WAIT_FOR_CHANGE, str(path)], stdout=subprocess.PIPE, text=True
    ) as waiter:
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "ready\n"
        ledger.set_facts(None, {"x": 1})
        assert waiter.stdout.readline() == "1\n"


def test_a_wait_looks_now_and_then_and_no_longer_than_asked(tmp_path: Path) -> None:
    """By the clock that it is given; nothing happens otherwise."""
    ledger, now = SQLiteLedger(tmp_path / "db"), [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    ledger.clock, ledger.sleep = (lambda: now[0]), sleep
    seen = ledger.lsn()
    assert ledger.wait(seen, 0.01) == seen
    assert now[0] == pytest.approx(0.01)


def test_importing_the_control_plane_loads_no_torch() -> None:
    """`import paceline` and its stores stay light."""
    code = (
        "import sys; from paceline import DataFlowController, SQLiteMetadataStore, StreamingRefChannel; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_ledger_that_is_taken_away_stops_its_role_at_once(tmp_path: Path, how: str) -> None:
    """Before it records a head: what goes into an unlinked file would be lost (as would the weights)."""
    path = tmp_path / "db"
    ledger = SQLiteLedger(path)
    capture(producer_of(ledger), 0)
    training = Training(consumer_of(ledger))
    training.step(0)
    path.rename(tmp_path / "elsewhere")
    if how == "replaced":
        SQLiteLedger(tmp_path / "other").close()
        (tmp_path / "other").rename(path)
    with pytest.raises(LedgerError, match=r"deleted or replaced.*put the ledger back"):
        training.checkpoint()
    with pytest.raises(LedgerError, match="deleted or replaced"):
        ledger.wait(0, 60.0)
    (tmp_path / "elsewhere").rename(path)
    assert training.checkpoint().step == 1


def test_a_failed_sync_is_final_and_the_next_opening_writes_the_log_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may keep pages that it failed to write: nothing is believed before they are written anew."""
    path = tmp_path / "db"
    ledger = SQLiteLedger(path, durability="head")
    producer = producer_of(ledger)
    connection = ledger._db

    class Failing:
        def execute(self, sql: str, *rest: object) -> object:
            if sql == "COMMIT":
                raise apsw.IOError("disk I/O error")
            return connection.execute(sql, *rest)

        def __getattr__(self, name: str) -> object:
            return getattr(connection, name)

    ledger._db = Failing()  # type: ignore[assignment]
    for _ in range(2):  # repeated under its number: still unknown
        with pytest.raises(UnknownResultError):
            ledger.lease(producer.fence.call(50), 1)
    with pytest.raises(LedgerError, match="failed to sync earlier"):
        ledger.lease(producer.fence.call(51), 1)
    ledger._db = connection
    ledger.close()
    mark = tmp_path / "db-unsynced"
    assert mark.exists()
    other = SQLiteLedger(path)
    assert not mark.exists()
    assert other.snapshot().prompts.leased == 0


def test_only_what_weights_depend_on_is_synced(tmp_path: Path) -> None:
    """With durability "head"; with "full" every change is."""
    for durability, expected in (("head", ["NORMAL", "FULL"]), ("full", ["FULL", "FULL"])):
        ledger = SQLiteLedger(tmp_path / durability, durability=durability)  # type: ignore[arg-type]
        seen: list[str] = []

        def trace(cursor: apsw.Cursor, sql: str, _: object, seen: list[str] = seen) -> bool:
            if sql == "COMMIT":
                level = cursor.get_connection().pragma("synchronous")
                seen.append({1: "NORMAL", 2: "FULL"}[level])
            return True

        ledger._db.exec_trace = trace
        ledger.set_facts(None, {"progress": 1})
        ledger.set_facts(None, {"identity": 1}, settle=True)
        ledger._db.exec_trace = None
        assert seen == expected
        ledger.close()


def test_a_start_costs_the_ledger_the_same_whatever_the_number_of_prompts(tmp_path: Path) -> None:
    """A prompt has a row only while it is in work: a million of them are one block and no rows."""
    ledger = SQLiteLedger(tmp_path / "db")
    producer = producer_of(ledger, prompts=1_000_000)
    assert [lease.ordinal for lease in producer.lease(4)] == [0, 1, 2, 3]
    assert ledger._value("SELECT count(*) FROM prompt") == 4
    assert ledger.snapshot().prompts.pending == 999_996
    assert ledger._value("PRAGMA page_count") < 64


def test_synced_changes_that_are_gone_are_missed(tmp_path: Path) -> None:
    """A flipped bit ends the log where it is, and SQLite takes the rest for never written."""
    program = (
        "import os, sys; from paceline.ledger.stores.sqlite import SQLiteLedger; "
        "ledger = SQLiteLedger(sys.argv[1], durability='full'); "
        "[ledger.set_facts(None, {'n': n}) for n in range(3)]; os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "ledger.db"
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -9
    log = bytearray((tmp_path / "ledger.db-wal").read_bytes())
    log[-1] ^= 1
    (tmp_path / "ledger.db-wal").write_bytes(log)
    with pytest.raises(SchemaError, match="ends at change 2, but change 3 was on the disk"):
        SQLiteLedger(path)
    (tmp_path / "ledger.db-gate").unlink()
    assert SQLiteLedger(path).facts() == {"n": 1}


def test_a_second_ledger_of_a_process_leaves_the_locks_of_the_first(tmp_path: Path) -> None:
    """Closing a file that was opened by hand would drop them all; then an older SQLite that only looks takes
    the ledger for unused, and removes the log."""
    ledgers = [SQLiteLedger(tmp_path / "ledger.db") for _ in range(2)]
    inode = (tmp_path / "ledger.db").stat().st_ino
    held = [line for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line]
    assert any("POSIX" in line for line in held), held
    ledgers[0].set_facts(None, {"n": 1})
