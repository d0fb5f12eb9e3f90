"""The ledger under power failures and failing file calls: seeded, counted."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import apsw

from paceline.errors import LedgerError, PacelineError, UnknownResultError
from paceline.ledger.records import Order, SourceBlock, Wanted, producer_role
from paceline.ledger.stores.sqlite import Durability, SQLiteLedger
from paceline.testing.ledger_history import FINAL, History, state_of
from paceline.testing.recording_vfs import FaultyVFS, RecordingVFS, images
from paceline.testing.samples import sample_ref
from paceline.testing.specification_of_steps import SpecificationLedger

LEDGER_FILES = ("ledger.db", "ledger.db-wal")


Fault = tuple[type[apsw.Error], str]  # as SQLite's own file layer tells it; the kind of call, see `FaultyVFS`
FAULTS: dict[str, Fault] = {
    "EIO or EDQUOT at a write": (apsw.IOError, "write"),
    "ENOSPC at a write": (apsw.FullError, "write"),
    "a short write": (apsw.FullError, "short write"),
    "a failed sync": (apsw.IOError, "sync"),
    "EIO at a read": (apsw.IOError, "read"),
    "EMFILE at an open": (apsw.CantOpenError, "open"),
    "EIO at a truncation": (apsw.IOError, "truncate"),
    "EIO at a look at a size": (apsw.IOError, "size"),
    "EIO at a removal": (apsw.IOError, "delete"),
    "a busy lock": (apsw.BusyError, "lock"),
    "EIO at a lock": (apsw.IOError, "lock"),
}


def open_ledger(folder: Path, durability: Durability = "full", vfs: str | None = None) -> SQLiteLedger:
    ledger = SQLiteLedger(folder / "ledger.db", durability=durability, vfs=vfs)
    ledger.archive_from = 2
    return ledger


def lose_power(
    folder: Path, seed: int, durability: Durability, *, calls: int, per_interval: int
) -> Counter[str]:
    """Record a history, then open every image of it; what was acknowledged must be there."""
    rng = random.Random(seed)
    vfs = RecordingVFS(f"power-{seed}-{durability}")
    live = folder / "live"
    live.mkdir(parents=True)
    ledger = open_ledger(live, durability, vfs.name)
    states: dict[int, Any] = {0: state_of(ledger)}
    vfs.mark(None)
    for name, call in History(ledger, rng).calls(calls):
        before = ledger.lsn()
        call()
        states[ledger.lsn()] = state_of(ledger)
        is_final = name in FINAL and ledger.lsn() > before  # what changes nothing syncs nothing
        vfs.mark((ledger.lsn(), is_final or durability == "full"))
    ledger.close()
    counts: Counter[str] = Counter(calls=len(states) - 1)
    kept = [event for event in vfs.events if event.kind == "mark" or event.file in LEDGER_FILES]
    seen = images(kept, rng, per_interval=per_interval, synced={})
    for number, (happened, files) in enumerate(seen):
        marks = [event.note for event in kept[:happened] if event.kind == "mark"]
        promised = max((lsn for lsn, kept in filter(None, marks) if kept), default=0)
        image = folder / f"image-{number}"
        image.mkdir()
        for name, data in files.items():
            (image / name).write_bytes(data)
        _check_image(image, states, promised, created=bool(marks), where=f"seed {seed}, event {happened}")
        counts["images"] += 1
    return counts


def _check_image(image: Path, states: dict[int, Any], promised: int, *, created: bool, where: str) -> None:
    ledger = open_ledger(image)
    lsn = ledger.lsn()
    assert lsn >= promised, f"{where}: call {promised} was acknowledged, the ledger is at {lsn}"
    assert created or lsn == 0
    assert state_of(ledger) == states[lsn], f"{where}: the ledger is not as it was after call {lsn}"
    _go_on_working(ledger, "after the power came back")
    ledger.close()
    for path in image.iterdir():
        if path.is_file():
            path.unlink()


def _go_on_working(ledger: SQLiteLedger, holder: str) -> None:
    """A producer can take over and capture a prompt that was never seen."""
    fence = ledger.acquire(producer_role("later"), holder, Order.ORDINAL)
    known = ledger.snapshot().prompts.known
    assert ledger.extend(fence.call(1), [SourceBlock(known, 1, "one more")]) == 1
    while ledger.lease(fence, 1)[-1].ordinal != known:
        pass
    [generation] = ledger.reserve(fence.call(2), [Wanted(known, "one more", 1)], None) or []
    ref = replace(sample_ref(999, ordinal=known), sample_id="one more", generation=generation)
    assert ledger.commit(fence.call(3), [ref]) == [True]


def fail_calls(folder: Path, seed: int, fault: str, *, lasting: bool, calls: int = 30) -> Counter[str]:
    """Fail the n-th file operation of one history, from its opening to its closing, for every n.

    Each call is whole or not there, as its error says; the store goes on or says that it stopped; the next
    process finds a sound ledger.
    """
    return _fail_every(
        folder, fault, lasting, lambda place, vfs: _play_until_it_fails(place, vfs, seed, calls)
    )


def fail_recovery(folder: Path, seed: int, fault: str, *, lasting: bool, calls: int = 30) -> Counter[str]:
    """The same from the opening of a ledger on whose process was killed: what it committed stays."""
    live = folder / "live"
    live.mkdir(parents=True)
    below = RecordingVFS(f"live-{live}")  # the file layer that it is opened with afterwards
    store = open_ledger(live, "full", below.name)
    for _, call in History(store, random.Random(seed)).calls(calls):
        call()
    expected = state_of(store)
    left = {name: (live / name).read_bytes() for name in LEDGER_FILES}
    store.close()

    def recover(place: Path, vfs: FaultyVFS) -> list[Any]:
        for name, data in left.items():
            (place / name).write_bytes(data)
        try:
            with _advised():
                opened = open_ledger(place, "full", vfs.name)
        except PacelineError:
            return [expected]
        allowed = _go_on(opened, [expected])
        _close(opened)
        return allowed

    return _fail_every(folder, fault, lasting, recover)


def _fail_every(
    folder: Path, fault: str, lasting: bool, play: Callable[[Path, FaultyVFS], list[Any]]
) -> Counter[str]:
    """`play` with the n-th operation failing, for every n; one of the states it names must be left."""
    error, kind = FAULTS[fault]
    counts: Counter[str] = Counter()
    for turn in itertools.count(1):
        place = folder / f"turn-{turn}"
        place.mkdir(parents=True)
        vfs = FaultyVFS(f"faulty-{place}-{fault}-{lasting}")
        vfs.arm(error, (kind,), turn, lasting=lasting)
        try:
            # SQLite ignores errors of its clean-up; Python would keep them, and open files with them.
            with patch.object(sys, "unraisablehook", lambda _: None):
                allowed = play(place, vfs)
            vfs.disarm()
            again = open_ledger(place)
            now = state_of(again)
            assert now in allowed, "half a call is on the disk, or another one than the error says"
            _go_on_working(again, "the next process")
            again.close()
        except Exception as found:
            found.add_note(f"operation {turn}: {fault}, lasting={lasting}")
            raise
        counts["faults"] += vfs.struck
        counts["runs"] += 1
        if not vfs.struck:
            return counts
    raise AssertionError("unreachable")


def _play_until_it_fails(place: Path, vfs: FaultyVFS, seed: int, calls: int) -> list[Any]:
    """The states that may be found by the next process."""
    twin = SpecificationLedger()
    twin.archive_from = 2
    before = after = state_of(twin)
    store = None
    try:
        with _advised():
            store = open_ledger(place, "full", vfs.name)
            mine, other = History(store, random.Random(seed)), History(twin, random.Random(seed))
            for (_, call), (_, same) in zip(mine.calls(calls), other.calls(calls), strict=False):
                same()
                before, after = after, state_of(twin)
                call()
            before = after
            _close(store)
    except UnknownResultError:
        allowed = [before, after]
    except PacelineError:
        allowed = [before]
    else:
        return [after]
    if store is not None:
        allowed = _go_on(store, allowed)
        _close(store)
    return allowed


def _close(store: SQLiteLedger) -> None:
    """SQLite ignores errors of its last clean-up, but a file layer written in Python hands them up."""
    with suppress(LedgerError), _advised():
        store.close()


def _go_on(store: SQLiteLedger, allowed: list[Any]) -> list[Any]:
    """One more call of the store that has just refused one; the states that may be found then."""
    with suppress(PacelineError), _advised():
        assert state_of(store) in allowed, "the store that failed reads what is not there"
    changed = [_with_fact(state) for state in allowed]
    try:
        with _advised():
            store.set_facts(None, {"after": 1})
    except UnknownResultError:
        return allowed + changed
    except PacelineError:
        return allowed
    return changed


def _with_fact(state: dict[str, Any]) -> dict[str, Any]:
    facts = {**state["facts"], "after": 1}
    return {**state, "facts": facts, "snapshot": {**state["snapshot"], "facts": facts}}


@contextmanager
def _advised() -> Iterator[None]:
    try:
        yield
    except PacelineError as error:
        if not error.next:
            raise AssertionError(f"no advice: {error}") from error
        raise
    except (apsw.Error, OSError) as error:  # raised where the store does not explain it
        raise AssertionError(f"unexplained: {error!r}") from error
