"""Moves a stopped run's ledger to another store: `paceline ledger copy`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from paceline.errors import ConfigError, LedgerError
from paceline.ledger.image import copy_ledger
from paceline.ledger.locks import RoleLock
from paceline.ledger.place import known, record
from paceline.ledger.settings import LedgerSection, RedisSection, SqliteSection
from paceline.ledger.table import LEDGERS

ROLES = ("supervisor", "producer", "consumer")


@dataclass(frozen=True)
class Moved:
    """`rows` were copied and compared; the run's ledger is now `where`, and its store `store`."""

    rows: int
    store: str
    where: str
    before: str


def move_ledger(directory: Path, to: str) -> Moved:
    """Copy the run's ledger to `to`, "sqlite" or a server's address, and make the copy the run's ledger.

    The old one stays, and the run does not use it any more. Raises RunBusyError while a role runs on this
    host, ConfigError for `to`, LedgerError for a copy that failed (nothing is changed then).
    """
    place = known(directory)
    if place is None:
        raise LedgerError(
            f"{directory} does not say where its ledger is.",
            why="A run's folder knows it from the first start on.",
            next="start the run once with this version, and copy its ledger then.",
        )
    with _at_rest(directory):
        source: LedgerSection = LEDGERS.find(str(place.section["store"])).parse(place.section)
        target = _section(to, source)
        where, before = target.where(directory, place.name), source.where(directory, place.name)
        if where == before:
            raise ConfigError(f"{before} is where the ledger is already.", next="name another place.")
        place.looked_at(source, directory).close()
        copied = copy_ledger(source.movable(directory, place.name), target.movable(directory, place.name))
        with closing(target.open(directory, place.name)) as ledger:
            record(target, directory, place.name, ledger)
        return Moved(copied.count, target.store, where, before)


def _section(to: str, source: LedgerSection) -> LedgerSection:
    if to == SqliteSection().store:
        return SqliteSection(durability=source.durability)
    try:
        return RedisSection(url=to, durability=source.durability)
    except ValidationError:
        raise ConfigError(
            "The place for the copy is neither 'sqlite' nor a server's address.",
            why="It may hold a password, so it is not shown here.",
            next="name sqlite, redis://HOST:PORT/DATABASE, rediss://... or unix:///PATH?db=DATABASE.",
        ) from None


@contextmanager
def _at_rest(directory: Path) -> Iterator[None]:
    """No role of the run is at work on this host meanwhile."""
    with ExitStack() as held:
        for role in sorted({*ROLES, *(path.stem for path in directory.glob("*.lock"))}):
            held.callback(RoleLock(directory, role).release)
        yield
