"""Ledgers of earlier versions: opened, migrated behind a backup, whole or not at all.

No version before 1 was released, so a migration is made up here: the next version renames a fact.
"""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from paceline.errors import SchemaError
from paceline.ledger.stores.sqlite import SCHEMA_VERSION, SQLiteLedger, schema
from paceline.testing.ledger_calls import RUN_ID, capture, producer_of

NEXT = SCHEMA_VERSION + 1


def to_the_next(db: apsw.Connection) -> None:
    db.execute("CREATE TABLE note (text TEXT)")
    db.execute("UPDATE fact SET key = 'name' WHERE key = 'run_id'")


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A ledger of today's version."""
    path = tmp_path / "ledger.db"
    old = SQLiteLedger(path)
    capture(producer_of(old), 0, 1)
    old.close()
    return path


@pytest.fixture
def migrating(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and a Paceline of the next version."""
    monkeypatch.setitem(schema.MIGRATIONS, SCHEMA_VERSION, to_the_next)
    return ledger


def version(path: Path) -> int:
    db = apsw.Connection(str(path))
    number = int(next(iter(db.execute("PRAGMA user_version")))[0])
    db.close()
    return number


def test_an_old_ledger_is_migrated_and_goes_on(migrating: Path) -> None:
    """Nothing it knew is forgotten, and the run can be continued."""
    new = SQLiteLedger(migrating)
    assert version(migrating) == NEXT
    assert new.facts() == {"name": RUN_ID}
    assert new.snapshot().committed == 2
    assert [lease.ordinal for lease in producer_of(new).lease(1)] == [2]


def test_the_old_ledger_is_kept_beside(migrating: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backup is a whole ledger of the old version: a person who wants to go back can."""
    SQLiteLedger(migrating).close()
    backup = migrating.with_name(f"ledger.db.v{SCHEMA_VERSION}.bak")
    assert version(backup) == SCHEMA_VERSION
    monkeypatch.delitem(schema.MIGRATIONS, SCHEMA_VERSION)
    assert SQLiteLedger(backup).facts() == {"run_id": RUN_ID}
    with pytest.raises(SchemaError, match="upgrade paceline"):
        SQLiteLedger(migrating)


def test_an_error_in_the_middle_leaves_the_old_version(migrating: Path) -> None:
    """Whichever statement fails: the next start finds the old version untouched and migrates it."""
    failed = 0
    while True:
        statements = 0
        db = apsw.Connection(str(migrating))

        def fail_at(cursor: apsw.Cursor, sql: str, bindings: object, last: int = failed + 1) -> bool:
            nonlocal statements
            statements += 1
            if statements == last and "ROLLBACK" not in sql:
                raise apsw.FullError("database or disk is full")
            return True

        db.exec_trace = fail_at
        try:
            schema.open_schema(db, migrating)
            break
        except apsw.FullError:
            failed += 1
        finally:
            db.exec_trace = None
            db.close()
        assert version(migrating) == SCHEMA_VERSION
    assert failed >= 7, "every statement of the migration was made to fail"
    assert SQLiteLedger(migrating).facts() == {"name": RUN_ID}


def test_a_view_migrates_nothing(migrating: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads a ledger of the version that it knows, and leaves it as it is."""
    from paceline.ledger.stores.sqlite.view import SQLiteView

    before = migrating.read_bytes()
    assert SQLiteView(migrating).snapshot().committed == 2
    assert migrating.read_bytes() == before
    monkeypatch.delitem(schema.MIGRATIONS, SCHEMA_VERSION)
