"""The whole of a ledger as rows that every store can write and read: how a ledger moves to another store.

A row is the name of its table and a list of JSON values, in the order of schema.sql (stores/sqlite):

    run          lsn, order, num_prompts, next_ordinal, closed, committed, next_generation, trained_step,
                 started_step, archived_step, archived_place, archived
    fact         key, JSON text
    role         name, epoch, holder
    source       first, count, digest
    prompt       ordinal, state, again, worker, attempt, deaths, reason
    intent       generation, sample_id, bytes, ordinal, worker, revoked
    sample       place, sample_id, ordinal, state, resident, bytes, generation, acked, step, reason, ref
    plan         step, rev, sample_ids, deaths
    checkpoint   step, name, manifest_digest, chain, first_place
    archive      the steps of one block: step, rev, [[place, sample_id, ordinal, finished], ...]

Tables come in this order, rows by their first value. A role's last operation and its result stay behind:
the process that could repeat it does not know the copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from paceline.errors import ConfigError, LedgerError
from paceline.ledger.facts import LEDGER

TABLES = (
    *("run", "fact", "role", "source", "prompt", "intent"),
    *("sample", "plan", "checkpoint", "archive"),
)
Row = tuple[str, list[Any]]


class Standing(NamedTuple):
    """The ledger at a place. `itself`: the same text under every name of the place; a copy has another."""

    facts: dict[str, Any]
    changes: int
    itself: str


class Movable(Protocol):
    """A place for a ledger, in one store. Adapters: stores/*/image.py."""

    def rows(self) -> Iterator[Row]:
        """The ledger that stands there. Raises LedgerMissingError."""

    def standing(self) -> Standing | None:
        """That ledger; None if there is none."""

    def write(self, rows: Iterable[Row], over: Standing | None) -> None:
        """Write a ledger that no process can open yet. Raises LedgerError if it would take the place of
        another ledger than `over`, which stood there when it was looked at (None: of none)."""

    def written(self) -> Iterator[Row]:
        """What `write` wrote."""

    def finish(self) -> None:
        """It is the ledger from now on."""


@dataclass
class Digest:
    """How many rows there were, and the hash of all of them."""

    count: int = 0

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256()

    def passing(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.count += 1
            self._hash.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
            yield row

    @property
    def text(self) -> str:
        return self._hash.hexdigest()


def copy_ledger(source: Movable, target: Movable) -> Digest:
    """Copy the ledger, and compare the copy with it, row by row, before it may be opened.

    Replaces an older copy of the same ledger, and nothing else. Raises LedgerError: a target that holds
    another or a newer ledger, or a source that changed meanwhile; ConfigError: the source itself.
    """
    before = source.standing()
    if before is None:
        next(source.rows())  # says what is missing
        raise LedgerError("The ledger was made while it was looked for.", next="copy again.")
    over = target.standing()
    _refuse_to_replace(before, over)
    told, found = Digest(), Digest()
    target.write(told.passing(source.rows()), over)
    for _ in found.passing(target.written()):
        pass
    if found != told or found.text != told.text or source.standing() != before:
        raise LedgerError(
            f"The copy has {found.count} rows, the ledger {told.count}, and they differ.",
            why="A process of the run changed the ledger, or a store failed. The copy is not used.",
            next="stop every process of the run, on every host, and copy again.",
        )
    target.finish()
    return told


def appeared(where: str) -> LedgerError:
    return LedgerError(
        f"A ledger appeared or changed in {where} while it was copied to.",
        why="Another process works there, and its ledger would be lost.",
        next="stop that process, or choose another place, and copy again.",
    )


def _refuse_to_replace(source: Standing, there: Standing | None) -> None:
    if there is None:
        return
    is_same = source.facts.get(LEDGER) == there.facts.get(LEDGER) is not None
    if source.itself == there.itself:
        raise ConfigError(
            "The place for the copy is the ledger's own, by another name.",
            why="The copy would replace the ledger before it is whole. Nothing was changed.",
            next="name another place, or keep the ledger where it is.",
        )
    if is_same and there.changes <= source.changes:
        return
    what = "a newer copy of this ledger" if is_same else "another ledger"
    raise LedgerError(
        f"There is {what} already where the copy would be ({there.changes} changes).",
        why="The copy would replace it. Nothing was changed.",
        next="choose another place, or move that ledger away.",
    )
