"""What the ledger must survive below it: power failures, failing calls, flipped bits. Seeded, counted."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import apsw

from paceline.errors import LedgerError, PacelineError
from paceline.ledger.stores.memory import InMemoryMetadataStore
from paceline.ledger.stores.sqlite import Durability, SQLiteMetadataStore
from paceline.testing.ledger_history import FINAL, History, state_of
from paceline.testing.recording_vfs import FaultyVFS, RecordingVFS, images
from paceline.testing.samples import sample_ref

LEDGER_FILES = ("ledger.db", "ledger.db-wal")


def open_ledger(folder: Path, durability: Durability = "full", vfs: str | None = None) -> SQLiteMetadataStore:
    store = SQLiteMetadataStore(folder / "ledger.db", durability=durability, vfs=vfs)
    store.fold_from = 2
    return store


def lose_power(
    folder: Path, seed: int, durability: Durability, *, calls: int, per_interval: int
) -> Counter[str]:
    """Record a history, then open every image of it; what was acknowledged must be there."""
    rng = random.Random(seed)
    vfs = RecordingVFS(f"power-{seed}-{durability}")
    live = folder / "live"
    live.mkdir(parents=True)
    store = open_ledger(live, durability, vfs.name)
    states: dict[int, Any] = {0: state_of(store)}
    vfs.mark(None)
    for name, call in History(store, rng).calls(calls):
        call()
        states[store.lsn()] = state_of(store)
        vfs.mark((store.lsn(), name in FINAL or durability == "full"))
    store.close()
    made = len(vfs.events)
    counts: Counter[str] = Counter(calls=len(states) - 1)
    seen = images(vfs.events[:made], rng, per_interval=per_interval, keep=lambda name: name in LEDGER_FILES)
    for number, (happened, files) in enumerate(seen):
        marks = [event.note for event in vfs.events[:happened] if event.kind == "mark"]
        promised = max((lsn for lsn, kept in filter(None, marks) if kept), default=0)
        image = folder / f"image-{number}"
        image.mkdir()
        for name, data in files.items():
            (image / name).write_bytes(data)
        _check_image(image, states, promised, created=bool(marks), where=f"seed {seed}, event {happened}")
        counts["images"] += 1
    return counts


def _check_image(image: Path, states: dict[int, Any], promised: int, *, created: bool, where: str) -> None:
    store = open_ledger(image)
    lsn = store.lsn()
    assert lsn >= promised, f"{where}: call {promised} was acknowledged, the ledger is at {lsn}"
    assert created or lsn == 0
    assert state_of(store) == states[lsn], f"{where}: the ledger is not as it was after call {lsn}"
    store.acquire_role("producer", "after the power came back")
    assert store.commit_sample(sample_ref(999)) is True
    store.close()
    for path in image.iterdir():
        if path.is_file():
            path.unlink()


def fail_calls(
    folder: Path,
    seed: int,
    error: type[Exception],
    kinds: tuple[str, ...],
    *,
    lasting: bool,
    calls: int = 30,
) -> Counter[str]:
    """Fail the n-th file operation of one history, for every n; each call is whole or not there."""
    counts: Counter[str] = Counter()
    turn = 0
    while True:
        turn += 1
        place = folder / f"turn-{turn}"
        place.mkdir(parents=True)
        vfs = FaultyVFS(f"faulty-{seed}-{error.__name__}-{'-'.join(kinds)}-{lasting}-{turn}")
        store = open_ledger(place, "full", vfs.name)
        vfs.arm(error, kinds, turn, lasting=lasting)
        struck = _play_until_it_fails(store, seed, calls)
        before, after = struck
        vfs.disarm()
        store.close()
        again = open_ledger(place)
        now = state_of(again)
        assert now in (before, after) or after is None, f"turn {turn}: half a call is on the disk"
        again.acquire_role("producer", "the next process")
        assert again.commit_sample(sample_ref(999)) is True
        again.close()
        counts["faults"] += vfs.struck
        counts["runs"] += 1
        if not vfs.struck:
            return counts


def _play_until_it_fails(store: SQLiteMetadataStore, seed: int, calls: int) -> tuple[Any, Any]:
    """The states before and after the call that failed; both the last one if none did."""
    twin = InMemoryMetadataStore()
    mine, other = History(store, random.Random(seed)), History(twin, random.Random(seed))
    before = state_of(twin)
    for (_, call), (_, same) in zip(mine.calls(calls), other.calls(calls), strict=False):
        same()
        after = state_of(twin)
        try:
            call()
        except PacelineError as error:
            if not error.next:
                raise AssertionError(f"no advice: {error}") from error
            return before, after
        except apsw.Error as error:  # raised where the store does not explain it
            raise AssertionError(f"unexplained: {error!r}") from error
        before = after
    return before, before


def flip_bits(folder: Path, seed: int, *, flips: int) -> Counter[str]:
    """One bit of the closed database at a time: found, or without any effect on what is read."""
    rng = random.Random(seed)
    origin = folder / "origin"
    origin.mkdir(parents=True)
    store = open_ledger(origin)
    for _, call in History(store, rng).calls(120):
        call()
    expected, lsn = state_of(store), store.lsn()
    store.close()
    whole = (origin / "ledger.db").read_bytes()
    counts: Counter[str] = Counter()
    for number in range(flips):
        place = folder / f"flip-{number}"
        place.mkdir()
        data = bytearray(whole)
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << (bit % 8)
        (place / "ledger.db").write_bytes(data)
        counts[_read_flipped(place, expected, lsn, where=f"seed {seed}, bit {bit}")] += 1
        for path in place.iterdir():
            if path.is_file():
                path.unlink()
    return counts


def _read_flipped(place: Path, expected: Any, lsn: int, *, where: str) -> str:
    try:
        store = open_ledger(place)
        found, number = state_of(store), store.lsn()
        store.close()
    except LedgerError:
        return "found"
    assert (found, number) == (expected, lsn), f"{where}: other values were read without a word"
    return "harmless"
