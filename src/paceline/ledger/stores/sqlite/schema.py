"""Creates the database's schema, recognises its version, and migrates older versions to the newest.

A migration first writes a backup (`ledger.db.v1.bak` of version 1) and then runs in one transaction, so a
crash in the middle leaves the old version. A newer version is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import apsw

from paceline.crashpoints import reach
from paceline.errors import SchemaError

APPLICATION_ID = 0x50414345  # "PACE"
SCHEMA_VERSION = 1
Change = Callable[[apsw.Connection], None]
MIGRATIONS: dict[int, Change] = {}  # from this version to the next one


def open_schema(db: apsw.Connection, path: Path) -> None:
    """Create or migrate the schema. Raises SchemaError for a file that this version cannot open."""
    version = known_version(db, path)
    if version is None:
        _in_one_transaction(db, _create, SCHEMA_VERSION)
        return
    newest = max(MIGRATIONS, default=SCHEMA_VERSION - 1) + 1
    if version < newest:
        back_up(db, path.with_name(f"{path.name}.v{version}.bak"))
    for number in range(version, newest):
        _in_one_transaction(db, MIGRATIONS[number], number + 1)


def known_version(db: apsw.Connection, path: Path) -> int | None:
    """The schema version of a ledger that this version can open; None for an empty database.

    Raises SchemaError for anything else.
    """
    application, version = _pragma(db, "application_id"), _pragma(db, "user_version")
    if not list(db.execute("SELECT 1 FROM sqlite_schema LIMIT 1")):
        return None
    if application != APPLICATION_ID:
        raise SchemaError(
            f"{path} is a database of another program (application id {application:#x}).",
            why="Writing to it would damage it.",
            next="choose another run.directory, or move that file away.",
        )
    newest = max(MIGRATIONS, default=SCHEMA_VERSION - 1) + 1
    if version > newest:
        raise SchemaError(
            f"{path} has schema version {version}; this Paceline knows {newest}.",
            why="A newer version wrote it, and a wrong guess at its meaning could lose samples.",
            next="upgrade paceline, or open the run with the version that made it.",
        )
    return version


def back_up(db: apsw.Connection, path: Path) -> None:
    """Write a whole copy beside the database. It replaces the copy of an interrupted attempt."""
    path.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(path),))


def _pragma(db: apsw.Connection, name: str) -> int:
    return int(next(iter(db.execute(f"PRAGMA {name}")))[0])


def _in_one_transaction(db: apsw.Connection, change: Change, version: int) -> None:
    db.execute("BEGIN EXCLUSIVE")
    try:
        change(db)
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute(f"PRAGMA user_version={version}")
        reach("ledger.before_migration_commit")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _create(db: apsw.Connection) -> None:
    db.execute(resources.files("paceline.ledger.stores.sqlite").joinpath("schema.sql").read_text())
