"""What is particular to the SQLite store: versions, identity, disks, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from paceline import SQLiteMetadataStore
from paceline.errors import ConfigError, LedgerError, SchemaError
from paceline.ledger import gate
from paceline.ledger.stores.sqlite import check_sqlite_version
from paceline.testing.samples import sample_ref


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
    monkeypatch.setattr(gate, "filesystem_of", lambda _: "nfs4")
    with pytest.raises(ConfigError, match=r"nfs4.*local disk"):
        SQLiteMetadataStore(tmp_path / "db")


def test_the_filesystem_of_a_folder_is_found() -> None:
    """/proc is a filesystem everyone knows the name of."""
    assert gate.filesystem_of(Path("/proc/self")) == "proc"


def test_a_newer_schema_is_refused_and_untouched(tmp_path: Path) -> None:
    """A database of a newer version is not guessed at."""
    path = tmp_path / "db"
    SQLiteMetadataStore(path).close()
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(SchemaError, match=r"99.*upgrade"):
        SQLiteMetadataStore(path)


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    """Pointing the run at some other database must not write into it."""
    path = tmp_path / "db"
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE precious (x)")
    connection.close()
    with pytest.raises(SchemaError, match="another program"):
        SQLiteMetadataStore(path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """Garbage is reported, not overwritten."""
    path = tmp_path / "db"
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 100)
    with pytest.raises(SchemaError, match="no database"):
        SQLiteMetadataStore(path)
    assert path.read_bytes().startswith(b"not a database")


def test_a_full_disk_rolls_back_and_advises(tmp_path: Path) -> None:
    """What was committed stays, the failed batch is gone whole, and the store goes on."""
    store = SQLiteMetadataStore(tmp_path / "db")
    store.commit_sample(sample_ref(0))
    store._db.execute(f"PRAGMA max_page_count={store._value('PRAGMA page_count')}")
    with pytest.raises(LedgerError, match="free space"):
        store.commit_samples([sample_ref(n) for n in range(1, 500)])
    assert store.all_committed_ids() == ["run0:s0"]
    store._db.execute("PRAGMA max_page_count=1000000")
    assert store.commit_sample(sample_ref(1)) is True


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    """Use after close is an error with advice, not a crash."""
    store = SQLiteMetadataStore(tmp_path / "db")
    store.close()
    with pytest.raises(LedgerError, match="closed"):
        store.committed_count()


COMMIT_AND_DIE = """
import sys
from paceline import SQLiteMetadataStore
from paceline.testing.kill_points import arm
from paceline.testing.samples import sample_ref
store = SQLiteMetadataStore(sys.argv[1])
arm(sys.argv[2])
store.commit_sample(sample_ref(0))
store.commit_samples([sample_ref(1), sample_ref(2)])
"""


@pytest.mark.parametrize(
    ("point", "survive"),
    [("ledger.before_commit:2", 1), ("ledger.after_commit:2", 3), ("ledger.after_commit:1", 1)],
)
def test_a_kill_leaves_whole_transactions(tmp_path: Path, point: str, survive: int) -> None:
    """SIGKILL before the commit loses the batch whole, after it keeps the batch whole."""
    path = tmp_path / "db"
    died = subprocess.run([sys.executable, "-c", COMMIT_AND_DIE, str(path), point], check=False)
    assert died.returncode == -9
    store = SQLiteMetadataStore(path)
    assert store.committed_count() == survive
    assert store.commit_sample(sample_ref(7)) is True


WAIT_FOR_CHANGE = """
import sys
from paceline import SQLiteMetadataStore
store = SQLiteMetadataStore(sys.argv[1])
seen = store.lsn()
print("ready", flush=True)
print(store.wait(seen, timeout_s=60.0) - seen, flush=True)
"""


def test_a_commit_wakes_a_waiter_in_another_process(tmp_path: Path) -> None:
    """The doorbell crosses processes; a dead waiter's bell is taken down."""
    path = tmp_path / "db"
    store = SQLiteMetadataStore(path)
    bell = tmp_path / "db-bell"
    stale = bell / "0-dead.fifo"
    os.mkfifo(stale)
    with subprocess.Popen(
        [sys.executable, "-c", WAIT_FOR_CHANGE, str(path)], stdout=subprocess.PIPE, text=True
    ) as waiter:
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "ready\n"
        while len(list(bell.glob("*.fifo"))) < 2:  # until it has hung its own up
            assert waiter.poll() is None
        store.set_facts({"x": 1})
        assert waiter.stdout.readline() == "1\n"
    assert not stale.exists()


def test_importing_the_control_plane_loads_no_torch() -> None:
    """`import paceline` and its stores stay light."""
    code = (
        "import sys; from paceline import DataFlowController, SQLiteMetadataStore, StreamingRefChannel; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_old_operations_are_dropped_whatever_calls_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest stay; calls without an op id in between make no difference."""
    monkeypatch.setattr("paceline.ledger.stores.sqlite.database.OPS_KEPT", 8)
    monkeypatch.setattr("paceline.ledger.stores.sqlite.database.OPS_AT_ONCE", 4)
    store = SQLiteMetadataStore(tmp_path / "db", durability="head")
    for number in range(100):
        reserved = store.reserve({"s": 1}, op_id=f"op-{number}")
        store.revoke(list(reserved.values()))
    assert store._value("SELECT count(*) FROM operation") <= 12
    assert store.reserve({"s": 1}, op_id="op-99") == reserved
    assert store.intents() == []
