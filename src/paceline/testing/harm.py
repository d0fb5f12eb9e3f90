"""Functions that damage a run on purpose, without the code that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import apsw


def sql(run: Path, *statements: str) -> None:
    """Statements that must each change a row."""
    db = apsw.Connection(str(run / "ledger.db"))
    for statement in statements:
        db.execute(statement)
        assert db.changes(), f"{statement} changed nothing"
    db.close()


def sql_unchecked(run: Path, change: str) -> None:
    """A statement against the schema, whatever it changes."""
    db = apsw.Connection(str(run / "ledger.db"))
    db.execute("PRAGMA ignore_check_constraints = 1")
    db.execute("PRAGMA writable_schema = 1")
    db.execute(change)
    db.close()


def one(run: Path, query: str) -> object:
    """The first value that the query finds."""
    db = apsw.Connection(str(run / "ledger.db"))
    value = next(iter(db.execute(query)))[0]
    db.close()
    return value


def statement(*statements: str) -> Callable[[Path], None]:
    """The harm that `sql` does with them."""
    return lambda run: sql(run, *statements)


def head_file(run: Path, name: str) -> Path:
    """A file of the newest checkpoint."""
    return run / "checkpoints" / str(one(run, "SELECT name FROM checkpoint ORDER BY step DESC")) / name
