"""A ledger on a server as rows, and rows as a ledger there (ledger/image.py)."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

from paceline.errors import LedgerMissingError
from paceline.ledger.image import TABLES, Row, Standing
from paceline.ledger.records import StepPlan, compacted
from paceline.ledger.stores.redis.address import Address
from paceline.ledger.stores.redis.reading import Reading
from paceline.ledger.stores.redis.requirements import Requirements
from paceline.ledger.stores.redis.server import PATIENCE_S, Server
from paceline.types import ref_from_json, ref_to_json

CHUNK = 500  # rows in one call; a visit in the archive counts as one


class ServerImage:
    """The ledger `name` on a server. A copy takes its place at once, and is not found until it is whole."""

    def __init__(self, url: str, name: str) -> None:
        """Raises ConfigError, LedgerError."""
        self._url, self._name = url, name
        self._identity = secrets.token_hex(8)  # of the copy

    def _opened(self) -> Reading:
        address = Address(self._url)
        admit = Requirements(address, "head").admit
        return Reading(Server(address, PATIENCE_S, admit), self._name, durability="head")

    def rows(self) -> Iterator[Row]:
        with closing(self._opened()) as ledger:
            ledger.know()
            yield from _rows_of(ledger)

    def standing(self) -> Standing | None:
        with closing(self._opened()) as ledger:
            try:
                ledger.know()
            except LedgerMissingError:
                return None
            snapshot = ledger.snapshot()
            return Standing(dict(snapshot.facts), snapshot.lsn, ledger.identity)

    def write(self, rows: Iterable[Row], over: Standing | None) -> None:
        seen = (None, None) if over is None else (over.itself, over.changes)
        with closing(self._opened()) as ledger:
            ledger._call("clear", None, self._identity, *seen)
            for chunk in chunked(rows):
                ledger._call("load", None, self._identity, [_stored(*row) for row in chunk])

    def written(self) -> Iterator[Row]:
        with closing(self._opened()) as ledger:
            yield from _rows_of(ledger)

    def finish(self) -> None:
        with closing(self._opened()) as ledger:
            ledger._call("loaded", None, self._identity, final=True)


def chunked(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk, size = list[Row](), 0
    for table, row in rows:
        chunk.append((table, row))
        size += sum(len(visits) for _, _, visits in row) if table == "archive" else 1
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _rows_of(ledger: Reading) -> Iterator[Row]:
    for table in TABLES:
        after: int | None = -1
        while after is not None:
            rows, after = ledger._ask("dump", table, after)
            for row in rows:
                yield table, _shown(table, row)


def _shown(table: str, row: list[Any]) -> list[Any]:
    if table == "archive":
        return [
            [step, rev, [[place, i, None if n is False else n, int(done)] for place, i, n, done in visits]]
            for step, rev, visits in row
        ]
    if table == "sample":
        *values, text, is_bare = row
        return [*values, ref_to_json(compacted(ref_from_json(text))) if is_bare else text]
    return row


def _stored(table: str, row: list[Any]) -> tuple[str, list[Any]]:
    if table == "plan":
        step, rev, sample_ids, _ = row
        return table, [*row, StepPlan(step, tuple(sample_ids), rev).digest]
    return table, row
