"""The database's schema: made, recognised, and migrated from any earlier version to the newest.

A migration is one transaction behind a backup (`ledger.db.v1.bak` of version 1, written before anything
is changed), so a crash in the middle leaves the old version. A newer version is refused.
"""

from __future__ import annotations

import json
import lzma
from hashlib import sha256
from importlib import resources
from pathlib import Path

import apsw

from paceline.crashpoints import reach
from paceline.errors import SchemaError

APPLICATION_ID = 0x50414345  # "PACE"
SCHEMA_USER_VERSION = 3
TASKS_OF_A_BLOCK = 4096


def open_schema(db: apsw.Connection, path: Path) -> None:
    """Make or migrate the schema. Raises SchemaError if the file is not one this version can open."""
    application = _pragma(db, "application_id")
    version = _pragma(db, "user_version")
    is_new = not list(db.execute("SELECT 1 FROM sqlite_schema LIMIT 1"))
    if not is_new and application != APPLICATION_ID:
        raise SchemaError(
            f"{path} is a database of another program (application id {application:#x}).",
            why="Writing to it would damage it.",
            next="choose another run.directory, or move that file away.",
        )
    if version > SCHEMA_USER_VERSION:
        raise SchemaError(
            f"{path} has schema version {version}; this Paceline knows {SCHEMA_USER_VERSION}.",
            why="A newer version wrote it, and guessing at its meaning could lose samples.",
            next="upgrade paceline, or open the run with the version that made it.",
        )
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    if is_new:
        _in_one_transaction(db, _create)
    elif version < SCHEMA_USER_VERSION:
        back_up(db, path.with_name(f"{path.name}.v{version}.bak"))
        if version == 1:
            db.execute("VACUUM")  # into pages with room for a checksum
        _in_one_transaction(db, _from_1 if version == 1 else _from_2)


def back_up(db: apsw.Connection, path: Path) -> None:
    """A whole copy beside the database. One of an earlier try that did not end is replaced."""
    path.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(path),))


def _pragma(db: apsw.Connection, name: str) -> int:
    return int(next(iter(db.execute(f"PRAGMA {name}")))[0])


def _in_one_transaction(db: apsw.Connection, change: object) -> None:
    assert callable(change)
    db.execute("BEGIN EXCLUSIVE")
    try:
        change(db)
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute(f"PRAGMA user_version={SCHEMA_USER_VERSION}")
        reach("ledger.before_migration_commit")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _create(db: apsw.Connection) -> None:
    db.execute(resources.files("paceline.ledger.stores.sqlite").joinpath("schema.sql").read_text())


def _from_2(db: apsw.Connection) -> None:
    """Fewer and smaller indexes: a commit writes half the pages."""
    for (index,) in list(db.execute("SELECT name FROM sqlite_schema WHERE type = 'index' AND sql NOT NULL")):
        db.execute(f"DROP INDEX {index}")
    new = apsw.Connection(":memory:")
    _create(new)
    for (index,) in new.execute("SELECT sql FROM sqlite_schema WHERE type = 'index' AND sql NOT NULL"):
        db.execute(index)


def _from_1(db: apsw.Connection) -> None:
    """Prompt ids go into blocks, done prompts and pending ones need no row any more."""
    old = ("run", "task", "sample", "plan", "checkpoint", "ack", "fact", "role")
    for index in ("task_open", "sample_unreleased", "sample_uncompacted", "ack_provisional"):
        db.execute(f"DROP INDEX IF EXISTS {index}")
    for table in old:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    _create(db)
    db.execute("INSERT INTO fact SELECT * FROM old_fact")
    db.execute("INSERT INTO role SELECT * FROM old_role")
    db.execute("INSERT INTO ack SELECT * FROM old_ack")
    db.execute(
        "INSERT INTO plan (step, sample_ids, last_seq) SELECT step, sample_ids, last_seq FROM old_plan"
    )
    db.execute(
        "INSERT INTO checkpoint (step, name, manifest_digest, last_seq) "
        "SELECT step, name, manifest_digest, last_seq FROM old_checkpoint"
    )
    db.execute(
        "INSERT INTO sample (seq, sample_id, task_id, ordinal, state, resident, bytes, ref) "
        "SELECT seq, sample_id, s.task_id, ordinal, s.state, s.state = 'present', bytes, ref "
        "FROM old_sample s LEFT JOIN old_task t ON t.task_id = s.task_id"
    )
    ids = [row[0] for row in db.execute("SELECT task_id FROM old_task ORDER BY ordinal")]
    for first in range(0, len(ids), TASKS_OF_A_BLOCK):
        part = json.dumps(ids[first : first + TASKS_OF_A_BLOCK]).encode()
        last = min(first + TASKS_OF_A_BLOCK, len(ids)) - 1
        db.execute(
            "INSERT INTO folded VALUES ('tasks', ?, ?, ?, ?)",
            (first, last, sha256(part).hexdigest(), lzma.compress(part)),
        )
    # Every prompt after the last one that is not simply pending was never leased.
    db.execute(
        "UPDATE run SET lsn = (SELECT lsn FROM old_run), num_tasks = ?, "
        "last_seq = (SELECT coalesce(max(seq), 0) FROM old_sample), "
        "next_ordinal = (SELECT coalesce(max(ordinal), -1) + 1 FROM old_task "
        "WHERE state != 'pending' OR attempt > 0), "
        "trained_step = (SELECT coalesce(max(step), 0) FROM old_checkpoint), "
        "folded_step = (SELECT coalesce(min(step), 0) FROM old_checkpoint)",
        (len(ids),),
    )
    db.execute(
        "INSERT INTO task (ordinal, task_id, state, holder, attempt, reason) "
        "SELECT ordinal, task_id, state, holder, attempt, reason FROM old_task "
        "WHERE state != 'done' AND ordinal < (SELECT next_ordinal FROM run)"
    )
    for table in old:
        db.execute(f"DROP TABLE old_{table}")
