"""A ledger's file as rows, and rows as a ledger's file (ledger/image.py)."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from paceline.durable_files import sync_folder
from paceline.ledger.image import Row, Standing, appeared
from paceline.ledger.stores.sqlite.archive import compressed
from paceline.ledger.stores.sqlite.ledger import SQLiteLedger
from paceline.ledger.stores.sqlite.run_row import READ, RunRow
from paceline.ledger.stores.sqlite.view import SQLiteView

SELECT = {
    "run": READ,
    "fact": "SELECT key, value FROM fact ORDER BY key",
    "role": "SELECT name, epoch, holder FROM role ORDER BY name",
    "source": "SELECT first, count, digest FROM source WHERE count > 0 ORDER BY first",
    "prompt": "SELECT ordinal, state, again, worker, attempt, deaths, reason FROM prompt ORDER BY ordinal",
    "intent": "SELECT generation, sample_id, bytes, ordinal, worker, revoked FROM intent ORDER BY generation",
    "sample": "SELECT place, sample_id, ordinal, state, resident, bytes, generation, acked, step, reason, "
    "ref FROM sample ORDER BY place",
    "plan": "SELECT step, rev, sample_ids, deaths FROM plan ORDER BY step",
    "checkpoint": "SELECT step, name, manifest_digest, chain, first_place FROM checkpoint ORDER BY step",
    "archive": "SELECT content FROM archive ORDER BY first",
}
INSERT = {
    "fact": "INSERT INTO fact VALUES (?, ?)",
    "role": "INSERT INTO role (name, epoch, holder) VALUES (?, ?, ?)",
    "source": "INSERT INTO source VALUES (?, ?, ?)",
    "prompt": "INSERT INTO prompt VALUES (?, ?, ?, ?, ?, ?, ?)",
    "intent": "INSERT INTO intent VALUES (?, ?, ?, ?, ?, ?)",
    "sample": "INSERT INTO sample VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "plan": "INSERT INTO plan VALUES (?, ?, ?, ?)",
    "checkpoint": "INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?)",
    "archive": "INSERT INTO archive VALUES (?, ?, ?, ?, ?)",
}


def rows_of(ledger: SQLiteLedger) -> Iterator[Row]:
    """Of one state of the ledger."""
    with ledger._reading():
        for table, select in SELECT.items():
            for values in ledger._db.execute(select):
                yield table, _shown(table, values)


def _shown(table: str, values: tuple[Any, ...]) -> list[Any]:
    if table == "archive":
        return list(json.loads(lzma.decompress(values[0])))
    if table == "plan":
        step, rev, sample_ids, deaths = values
        return [step, rev, json.loads(sample_ids), deaths]
    return list(values)


def _stored(table: str, row: list[Any]) -> tuple[Any, ...]:
    if table == "archive":
        data = json.dumps(row, separators=(",", ":")).encode()
        finished = sum(visit[3] for _, _, visits in row for visit in visits)
        return row[0][0], row[-1][0], finished, hashlib.sha256(data).hexdigest(), compressed(data)
    if table == "plan":
        step, rev, sample_ids, deaths = row
        return step, rev, json.dumps(sample_ids), deaths
    return tuple(row)


class FileImage:
    """The ledger in a file, and a copy that is written beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self._copy = path, path.with_name(path.name + ".copy")
        self._over: Standing | None = None

    def rows(self) -> Iterator[Row]:
        SQLiteView(self.path)  # raises before a ledger is created
        with closing(SQLiteLedger(self.path)) as ledger:
            yield from rows_of(ledger)

    def standing(self) -> Standing | None:
        if not self.path.exists():
            return None
        snapshot = SQLiteView(self.path).snapshot()
        return Standing(dict(snapshot.facts), snapshot.lsn, str(self.path.resolve()))

    def write(self, rows: Iterable[Row], over: Standing | None) -> None:
        self._over = over
        _remove(self._copy)
        with closing(SQLiteLedger(self._copy)) as ledger, ledger._mutation(None, final=True) as operation:
            for table, row in rows:
                if table == "run":
                    operation.run = RunRow(*row)
                    operation.run.lsn -= 1  # the end of the transaction counts it
                else:
                    ledger._change(INSERT[table], *_stored(table, row))

    def written(self) -> Iterator[Row]:
        with closing(SQLiteLedger(self._copy)) as ledger:
            yield from rows_of(ledger)

    def finish(self) -> None:
        if self.standing() != self._over:
            raise appeared(str(self.path))
        _remove(self.path)
        self._copy.rename(self.path)
        _remove(self._copy)
        sync_folder(self.path.parent)


def _remove(path: Path) -> None:
    """A ledger's file, and what stands beside it."""
    for name in ("", "-wal", "-shm", "-gate", "-unsynced"):
        path.with_name(path.name + name).unlink(missing_ok=True)
