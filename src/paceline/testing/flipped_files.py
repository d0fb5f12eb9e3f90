"""One flipped bit at a time, in checkpoints, the ref channel and shared memory: seeded, counted.

A checkpoint must be refused, whichever file has the flipped bit. A channel must be refused or read exactly. A
feature `get` must raise FeatureMissing or FeatureCorrupt, or return exactly what was sealed. Only the sample
with the flipped bit may be affected, and it can be captured again.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from paceline.compat.streaming_channel import StreamingRefChannel
from paceline.errors import (
    CheckpointError,
    FeatureCorruptError,
    FeatureMissingError,
    LedgerError,
    StoreError,
)
from paceline.features import codec
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.features.stores.slots import HEADER_BYTES, PAGE_BYTES
from paceline.testing.feature_store_suite import assert_same, feature_ref, features
from paceline.testing.samples import sample_ref
from paceline.testing.shared_memory import owner_of, reader_of, slot_files
from paceline.training.checkpoint import MANIFEST, Checkpoint, CheckpointFolder
from paceline.types import SampleRef

SAMPLES = 3


def flip(path: Path, bit: int) -> None:
    """Bit `bit` of the file, past whoever has it mapped."""
    fd = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(fd, 1, bit // 8)
        os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), bit // 8)
    finally:
        os.close(fd)


# -- checkpoints -----------------------------------------------------------------------------


def flip_checkpoints(folder: Path, seed: int, *, flips: int) -> Counter[str]:
    """Flips in the manifest and in every file in turn; all are found, on record or not."""
    rng = random.Random(seed)
    checkpoints = CheckpointFolder(folder / "checkpoints", "run0")
    older, newer = (
        Checkpoint(step, 8 * step, _files(rng), {"position": [0, step]}, chain="c" * 64, epoch=1)
        for step in (1, 2)
    )
    kept, hit = checkpoints.write(older), checkpoints.write(newer)
    names = [MANIFEST, *(name for name, content in newer.files.items() if content)]
    counts: Counter[str] = Counter()
    for number in range(flips):
        path = checkpoints.folder / hit.name / names[number % len(names)]
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        try:
            checkpoints.read(hit)
        except CheckpointError as error:
            counts[path.name] += bool(error.next)
        else:
            raise AssertionError(f"seed {seed}: bit {bit} of {path.name} was believed")
        offered = [record for record, _ in checkpoints.unrecorded([kept])]
        assert offered == [], f"seed {seed}: with bit {bit} of {path.name} flipped it could be adopted"
        assert checkpoints.read(kept) == older
        flip(path, bit)
    assert checkpoints.read(hit) == newer
    assert [record for record, _ in checkpoints.unrecorded([kept])] == [hit]
    return counts


def _files(rng: random.Random) -> dict[str, bytes]:
    sizes = {"draft.safetensors": 9000, "optimizer.safetensors": 5000, "rng.safetensors": 64, "empty": 0}
    return {name: rng.randbytes(size) for name, size in sizes.items()}


# -- the ref channel -------------------------------------------------------------------------


def flip_channels(folder: Path, seed: int, *, flips: int) -> Counter[str]:
    """Flips in the log of refs, a torn write in it, and in the count of the consumed."""
    rng = random.Random(seed)
    log = folder / "refs"
    count = folder / "refs.consumed"
    published = _publish(log, rng)
    reader = StreamingRefChannel(log)
    reader.mark_consumed(rng.randint(1, len(reader.poll())))
    expected = (published, reader.in_flight_remote())
    counts: Counter[str] = Counter()
    for number in range(flips):
        path = count if number % 5 == 0 else log
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        try:
            channel = StreamingRefChannel(log)
            found = ([ref.sample_id for ref in channel.poll()], channel.in_flight_remote())
        except LedgerError as error:
            counts[f"{path.name}: refused"] += bool(error.next)
        else:
            assert found == expected, f"seed {seed}: bit {bit} of {path.name} was believed"
            counts[f"{path.name}: exact"] += 1
        flip(path, bit)
    assert [ref.sample_id for ref in StreamingRefChannel(log).poll()] == published
    return counts


def _publish(log: Path, rng: random.Random) -> list[str]:
    """Ids in the order of the log: of several writers, one of whom died in the middle of a write."""
    ids = []
    for turn in range(4):
        refs = [sample_ref(10 * turn + n) for n in range(rng.randint(1, 4))]
        StreamingRefChannel(log).publish_many(refs)
        ids += [ref.sample_id for ref in refs]
        if turn == 1:
            whole = log.read_bytes()
            log.write_bytes(whole + whole[: rng.randrange(60, 200)])
    return ids


# -- features in shared memory ---------------------------------------------------------------


WORDS = (
    *("magic", "version", "file bytes", "state", "generation", "freed by owner", "freed by reader"),
    *("payload bytes", "digest high", "digest low", "text bytes"),
)
Place = Callable[[random.Random, SampleRef], int]  # the byte to hit


def _in_payload(rng: random.Random, ref: SampleRef) -> int:
    layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
    place = rng.choice(layout.places)
    return HEADER_BYTES + place.offset + rng.randrange(place.num_bytes)


def _in_description(rng: random.Random, ref: SampleRef) -> int:
    layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
    return 128 + rng.randrange(len(codec.describe(ref.sample_id, layout)))


def _in_word(number: int) -> Place:
    return lambda rng, _: 8 * number + rng.randrange(8)


SLOT: dict[str, Place] = {
    "payload": _in_payload,
    "description": _in_description,
    **{name: _in_word(number) for number, name in enumerate(WORDS)},
    "rest of the header": lambda rng, _: rng.choice(
        (rng.randrange(88, 128), rng.randrange(1024, HEADER_BYTES))
    ),
}
IDENTITY: dict[str, Place] = {
    "identity words": lambda rng, _: rng.randrange(40),
    "identity boot and name": lambda rng, _: rng.choice((rng.randrange(64, 100), rng.randrange(128, 160))),
    "rest of the identity": lambda rng, _: rng.randrange(160, PAGE_BYTES),
}
FOUND = ("payload", "description", "digest high", "digest low", "text bytes", "payload bytes")


def flip_features(folder: Path, seed: int, *, flips: int) -> Counter[str]:
    """Every flip on a store of its own: under both live processes, or between two lives of them."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    classes = [*SLOT, *IDENTITY]
    # Payload, description and digest are most of what is read: they take every second flip.
    often = ("payload", "description", "digest high", "digest low")
    for number in range(flips):
        name = often[number // 2 % 4] if number % 2 else classes[number // 2 % len(classes)]
        directory = folder / f"store-{number}"
        try:
            counts[f"{name}: {_flip_one(directory, name, rng)}"] += 1
        except Exception as error:
            error.add_note(f"seed {seed}, flip {number}: {name}")
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    return counts


def _flip_one(directory: Path, name: str, rng: random.Random) -> str:
    """What came of it for the sample that was hit: exact, missing, corrupt or refused (the whole store)."""
    stores = [owner_of(directory), reader_of(directory)]
    issued = rng.random() < 0.5  # generations come from a ledger's intents, or the slots count themselves
    for n in range(SAMPLES):  # so that generations and freed words are not all 0
        stores[0].put(f"old{n}", features(100 + n), generation=issued * (1 + n))
    for n in range(SAMPLES):
        stores[n % 2].free([(f"old{n}", 0)])
    refs = []
    for n in range(SAMPLES):
        sealed = stores[0].put(f"s{n}", features(n), generation=issued * (11 + n))
        refs.append(feature_ref(f"s{n}", sealed))
    if rng.random() < 0.5:
        for ref in refs:
            stores[1].get(ref)
    target = rng.choice(refs)
    slot = next(iter(target.feature_keys.values())).partition("/")[0]
    path = directory / (slot if name in SLOT else "identity")
    assert path in slot_files(directory) or name in IDENTITY
    at = (SLOT | IDENTITY)[name](rng, target)
    if rng.random() < 0.5:
        flip(path, 8 * at + rng.randrange(8))
    else:
        for store in stores:
            store.close()
        flip(path, 8 * at + rng.randrange(8))
        try:
            stores = [reader_of(directory), owner_of(directory)]
        except StoreError as error:
            return _refused(error, name)
    outcomes = set()
    for store in stores:
        for ref in refs:
            outcome = _get(store, ref)
            if ref is target:
                outcomes.add(outcome)
            else:
                assert outcome == "exact" or name in IDENTITY, f"{ref.sample_id} was not hit, but {outcome}"
    if name in FOUND:
        assert "exact" not in outcomes, "the flip was not seen"
    _go_on(next(store for store in stores if store._owner), target, generation=issued * 21)
    return min(outcomes, key=("corrupt", "missing", "exact").index)


def _refused(error: StoreError, name: str) -> str:
    assert name in IDENTITY, "one slot does not spoil the store"
    assert error.next, f"no advice: {error}"
    return "refused"


def _get(store: SharedMemoryFeatureStore, ref: SampleRef) -> str:
    try:
        got = store.get(ref)
    except FeatureMissingError:
        return "missing"
    except FeatureCorruptError:
        return "corrupt"
    assert_same(got, features(int(ref.sample_id[1:])))
    return "exact"


def _go_on(owner: SharedMemoryFeatureStore, hit: SampleRef, generation: int) -> None:
    """The producer captures again what was hit, and something new."""
    owner.free([(hit.sample_id, 0)])
    for sample_id, seed in ((hit.sample_id, 7), ("new", 8)):
        ref = feature_ref(sample_id, owner.put(sample_id, features(seed), generation=generation))
        assert_same(owner.get(ref), features(seed))
    kept = {hit.sample_id, "new"}
    owner.free([one for one in owner.written() if one[0] not in kept])
    assert {sample_id for sample_id, _ in owner.written()} == kept
