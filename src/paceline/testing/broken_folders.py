"""What checkpoints must survive below them: power failures, failing calls, flipped bits. Seeded, counted."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from paceline import durable_files
from paceline.errors import CheckpointError
from paceline.ledger.records import CheckpointRecord, TrainedSample, TrainedStep
from paceline.testing.recorded_files import RecordedFiles
from paceline.training.checkpoint import Checkpoint, CheckpointFolder

RUN_ID = "run0"


def checkpoint_of(step: int, rng: random.Random) -> Checkpoint:
    """Two files of several pages, and a lineage."""
    files = {name: rng.randbytes(rng.randint(1, 9000)) for name in ("draft.safetensors", "rng.safetensors")}
    lineage = (TrainedStep(step, 0, step, (TrainedSample(step, f"run0:{step}", None, True),)),)
    return Checkpoint(step, step, files, {"position": [step, 0]}, lineage, f"step-{step - 1}", "c", 1, step)


def lose_power(folder: Path, seed: int, *, writes: int, per_step: int) -> Counter[str]:
    """After every file operation of a run of checkpoints: images of what may be left, each looked at."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    live = folder / "live"
    live.mkdir(parents=True)
    recorded = RecordedFiles(live)
    written: dict[CheckpointRecord, Checkpoint] = {}
    heads: list[CheckpointRecord] = []

    def look() -> None:
        for _ in range(per_step):
            image = folder / "image"
            shutil.rmtree(image, ignore_errors=True)
            image.mkdir()
            recorded.image(image, rng)
            _check_image(image, heads, list(written.values()), f"seed {seed}, operation {recorded.steps}")
            counts["images"] += 1

    store = CheckpointFolder(live, RUN_ID)
    for step in range(writes):
        checkpoint = checkpoint_of(step, rng)
        planned = dict(written)
        with recorded.watching(look):
            written[CheckpointRecord(step, "being written", "", step)] = checkpoint
            record = store.write(checkpoint)
        written = {**planned, record: checkpoint}
        heads.append(record)  # the ledger names it now, durably
        if len(heads) > 2:
            heads.pop(0)
        with recorded.watching(look):
            store.sweep(keep={head.name for head in heads})
        counts["checkpoints"] += 1
    return counts


def _check_image(image: Path, heads: list[CheckpointRecord], written: list[Checkpoint], where: str) -> None:
    store = CheckpointFolder(image, RUN_ID)
    for head in heads:
        try:
            found = store.read(head)
        except CheckpointError as error:
            raise AssertionError(f"{where}: the recorded {head.name} is gone: {error}") from error
        assert found in written, f"{where}: {head.name} is another checkpoint"
    for record, checkpoint in store.unrecorded(heads):
        assert checkpoint in written, f"{where}: {record.name} was never written like that"
        assert store.read(record) == checkpoint
    store.sweep(keep={head.name for head in heads})
    assert {path.name for path in image.iterdir()} == {head.name for head in heads}


FAULTS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE)


def fail_calls(folder: Path, seed: int, number: int, *, calls: tuple[str, ...]) -> Counter[str]:
    """Fail the n-th of these calls of one write, for every n: older checkpoints stay, a later one works."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    turn = 0
    while True:
        turn += 1
        place = folder / f"{number}-{'-'.join(calls)}-{turn}"
        store = CheckpointFolder(place, RUN_ID)
        old, new = checkpoint_of(1, rng), checkpoint_of(2, rng)
        record = store.write(old)
        failing = _FailingOs(calls, turn, OSError(number, os.strerror(number)))
        with patch.object(durable_files, "os", failing):
            try:
                made = store.write(new)
            except CheckpointError as error:
                if not error.next:
                    raise AssertionError(f"no advice: {error}") from error
                made = None
        assert store.read(record) == old
        found = [checkpoint for _, checkpoint in store.unrecorded([record])]
        assert found in ([], [new]), "half a checkpoint was taken for one"
        if made is not None:
            assert store.read(made) == new
            return counts
        later = checkpoint_of(3, rng)
        assert store.read(store.write(later)) == later
        counts["faults"] += 1


class _FailingOs:
    def __init__(self, calls: tuple[str, ...], turn: int, error: OSError) -> None:
        self._calls = calls
        self._left = turn
        self._error = error

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self._calls:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise self._error
            return real(*args, **kwargs)

        return call


def flip_bits(folder: Path, seed: int, *, flips: int) -> Counter[str]:
    """One bit of a recorded checkpoint at a time, in whatever file: always found."""
    rng = random.Random(seed)
    store = CheckpointFolder(folder, RUN_ID)
    record = store.write(checkpoint_of(4, rng))
    counts: Counter[str] = Counter()
    for _ in range(flips):
        path = rng.choice(sorted((folder / record.name).iterdir()))
        whole = path.read_bytes()
        data, bit = bytearray(whole), rng.randrange(len(whole) * 8)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        try:
            store.read(record)
        except CheckpointError:
            counts[f"found in {path.name}"] += 1
        else:
            raise AssertionError(f"seed {seed}: bit {bit} of {path.name} flipped, and nobody noticed")
        assert store.unrecorded([]) == [], "nor is it adopted"
        path.write_bytes(whole)
    return counts
