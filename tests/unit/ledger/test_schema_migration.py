"""Ledgers of earlier versions: opened, migrated behind a backup, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from paceline import SQLiteMetadataStore
from paceline.ledger.records import CheckpointRecord, StepAck, StepPlan, TaskLease
from paceline.ledger.stores.sqlite.page_checksums import RESERVED_BYTES, accept_pages, checksum_layer
from paceline.ledger.stores.sqlite.schema import SCHEMA_USER_VERSION, open_schema
from paceline.testing.samples import sample_ref

GOLDEN = {version: Path(__file__).parent / "golden" / f"ledger-v{version}.sql" for version in (1, 2)}
IDS = [f"run0:s{n}" for n in range(6)]


@pytest.fixture(params=GOLDEN)
def old(request: pytest.FixtureRequest) -> int:
    """Its schema version."""
    return int(request.param)


@pytest.fixture
def ledger(tmp_path: Path, old: int) -> Path:
    """The golden ledger of an old schema version."""
    path = tmp_path / "ledger.db"
    db = apsw.Connection(str(path))
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(GOLDEN[old].read_text())
    db.close()
    return path


def schema(path: Path) -> dict[str, str]:
    """The statement of every table and index, by name."""
    db = apsw.Connection(str(path))
    statements = dict(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql NOT NULL"))
    db.close()
    return statements


def version(path: Path) -> int:
    db = apsw.Connection(str(path))
    number = int(next(iter(db.execute("PRAGMA user_version")))[0])
    db.close()
    return number


def check(store: SQLiteMetadataStore) -> None:
    """Everything that the golden ledger says, in the words of today."""
    assert store.facts() == {"run_id": "run0"}
    assert store.all_committed_ids() == IDS
    assert store.durable_marker()["acked"] == set(IDS[:4])
    assert store.checkpoints() == [
        CheckpointRecord(1, "step-1", "digest-1", 2),
        CheckpointRecord(2, "step-2", "digest-2", 4),
    ]
    assert store.trained_step() == 2
    assert store.get_plan(3) == StepPlan(3, (IDS[4], IDS[5]), 6)
    assert store.present_ids() == IDS[2:5]
    assert store.lost_ids() == [IDS[5]]
    assert store.releasable(9) == IDS[2:4]
    assert store.failed_tasks() == {"task-6": "too long"}
    assert store.task_counts() == {"pending": 2, "leased": 1, "done": 5, "failed": 1}
    assert store.role_epochs() == {"producer": 1, "consumer": 1}
    assert store.usage().waiting_samples == 2
    assert store.lsn() >= 19


def test_a_migrated_ledger_has_the_schema_of_a_new_one(ledger: Path, tmp_path: Path) -> None:
    """Indexes included: a missing one would only be slow, and nobody would notice."""
    SQLiteMetadataStore(ledger).close()
    SQLiteMetadataStore(tmp_path / "new.db").close()
    assert schema(ledger) == schema(tmp_path / "new.db")


def test_a_ledger_with_page_checksums_keeps_them(tmp_path: Path) -> None:
    """Version 2 had them already; the migration writes its pages through the same layer."""
    ledger = tmp_path / "ledger.db"
    db = apsw.Connection(str(ledger), vfs=checksum_layer())
    db.reserve_bytes(None, RESERVED_BYTES)
    db.execute(GOLDEN[2].read_text())
    db.close()
    store = SQLiteMetadataStore(ledger)
    check(store)
    store.close()
    assert accept_pages(ledger) == 0
    check(SQLiteMetadataStore(ledger))


def test_an_operation_of_before_the_migration_is_known_after_it(tmp_path: Path) -> None:
    """Its caller may ask again for the answer that it missed."""
    db = apsw.Connection(str(tmp_path / "ledger.db"))
    db.execute(GOLDEN[2].read_text())
    db.close()
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    assert store.reserve({"run0:s8": 9}, op_id="op-a") == {"run0:s8": 1}
    assert [intent.generation for intent in store.intents()] == [1]


def test_an_old_ledger_is_migrated_and_goes_on(ledger: Path) -> None:
    """Nothing it knew is forgotten, and the run can be continued."""
    store = SQLiteMetadataStore(ledger)
    check(store)
    assert version(ledger) == SCHEMA_USER_VERSION
    fence = store.acquire_role("producer", "next")
    leases = store.lease_tasks("w", 9, fence=fence)
    assert leases == [TaskLease("task-5", 5, 0), TaskLease("task-7", 7, 0, 1), TaskLease("task-8", 8, 0)]
    assert store.commit_sample(sample_ref(5, num_bytes=7)) is True
    assert store.lost_ids() == []
    assert store.commit_sample(sample_ref(1)) is False
    assert store.add_tasks([f"task-{n}" for n in range(10)]) == 1
    store.ack_step(StepAck(3, 0, tuple(IDS[4:6])))


def test_the_old_ledger_is_kept_beside(ledger: Path, old: int) -> None:
    """The backup is a whole ledger of the old version: who wants to go back can."""
    SQLiteMetadataStore(ledger).close()
    backup = ledger.with_name(f"ledger.db.v{old}.bak")
    assert version(backup) == old
    check(SQLiteMetadataStore(backup))


def test_an_error_in_the_middle_leaves_the_old_version(ledger: Path, old: int) -> None:
    """Whichever statement fails: the next start finds the old version untouched and migrates it."""
    failed = 0
    while True:
        statements = 0
        db = apsw.Connection(str(ledger))

        def fail_at(cursor: apsw.Cursor, sql: str, bindings: object, last: int = failed + 1) -> bool:
            nonlocal statements
            statements += 1
            if statements == last and "ROLLBACK" not in sql:
                raise apsw.FullError("database or disk is full")
            return True

        db.exec_trace = fail_at
        try:
            open_schema(db, ledger)
            break
        except apsw.FullError:
            failed += 1
        finally:
            db.exec_trace = None
            db.close()
        assert version(ledger) == old
    assert failed > {1: 30, 2: 20}[old], "every statement of the migration was made to fail"
    check(SQLiteMetadataStore(ledger))


def test_a_kill_in_the_middle_leaves_the_old_version(ledger: Path, old: int) -> None:
    """SIGKILL right before the migration's commit."""
    code = (
        "import sys\nfrom paceline import SQLiteMetadataStore\nfrom paceline.testing.kill_points import arm\n"
        "arm('ledger.before_migration_commit')\nSQLiteMetadataStore(sys.argv[1])"
    )
    died = subprocess.run([sys.executable, "-c", code, str(ledger)], check=False)
    assert died.returncode == -9
    assert version(ledger) == old
    check(SQLiteMetadataStore(ledger))
