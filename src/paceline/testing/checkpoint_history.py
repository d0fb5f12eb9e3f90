"""Checkpoints under power failures and failing file calls: seeded histories, counted.

Every image of the disk must hold what was promised to a `Consumer` at that moment, and a new consumer must go
on from it.
"""

from __future__ import annotations

import itertools
import random
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

from paceline.errors import CheckpointError
from paceline.testing.checkpoint_consumer import KEPT, RUN, Consumer, Journal, Promise
from paceline.testing.file_images import Image, images
from paceline.testing.recording_files import CODES, Killed, RecordedFiles, Strike, failing
from paceline.training.checkpoint import CheckpointFolder

FOLDER = Path("runs") / RUN / "checkpoints"


@contextmanager
def named_by(seed: int) -> Iterator[None]:
    """Folders get the same names, and so the same order, whenever the seed is the same."""
    rng = random.Random(seed)
    with patch.object(uuid, "uuid4", lambda: uuid.UUID(int=rng.getrandbits(128))):
        yield


# -- power failures --------------------------------------------------------------------------


def lose_power(folder: Path, seed: int, *, saves: int, per_point: int) -> Counter[str]:
    """Record a history with kills and failures in it, then go on from every image of it."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    live = folder / "live"
    live.mkdir(parents=True)
    files = RecordedFiles(live)
    consumer = Consumer(live / FOLDER, Journal(), rng, files.mark)
    with files.watching(), named_by(seed):
        _survive(files, rng, consumer.start, consumer, counts)
        for _ in range(saves):
            _survive(files, rng, partial(_cycle, consumer), consumer, counts)
            with files.paused():
                consumer.check()
    for number, image in enumerate(images(files.operations, rng, per_point=per_point)):
        check_image(image, consumer, folder / f"image-{number}", f"seed {seed}")
        counts["images"] += 1
    counts["operations"] = sum(operation.kind != "mark" for operation in files.operations)
    return counts


def _cycle(consumer: Consumer) -> None:
    consumer.save(consumer.train())
    consumer.retire()


def _survive(
    files: RecordedFiles,
    rng: random.Random,
    act: Callable[[], None],
    consumer: Consumer,
    counts: Counter[str],
) -> None:
    """Do it, perhaps with a kill or a failing disk on the way; start again until that goes well."""
    while True:
        trouble = rng.choice(("none", "killed", "failing"))
        kinds, most = rng.choice(((Strike.kinds, 30), (("sync",), 7)))
        turn = rng.randint(1, most)
        if trouble == "killed":
            files.arm(Strike(Killed, turn, kinds, lasting=True))
        elif trouble == "failing":
            code = rng.choice(list(CODES.values()))
            files.arm(Strike(failing(code), turn, kinds, lasting=rng.random() < 0.5))
        try:
            act()
        except (Killed, CheckpointError) as error:
            assert files.struck, "only what was injected may fail"
            counts[type(error).__name__] += 1
            act = consumer.start
        else:
            files.arm(None)
            return
        files.arm(None)


def check_image(image: Image, before: Consumer, folder: Path, where: str) -> None:
    """Read what was promised, start a consumer on it, save once more."""
    promise: Promise = image.note or Promise(0, frozenset())
    journal = before.journal.as_of(promise.calls)
    consumer = Consumer(folder / FOLDER, journal, random.Random(0))
    consumer.attempted, consumer.written = list(before.attempted), dict(before.written)
    consumer.whole = set(promise.whole)
    steps = [record.step for record in (*promise.whole, *consumer.records())]
    with image.laid_out(folder, where):
        consumer.folder = CheckpointFolder(consumer.place, RUN)
        consumer.check()
        consumer.start()
        assert set(consumer.reports) <= {"rolled_forward"}, consumer.reports
        assert (consumer.head.step if consumer.head else -1) >= max(steps, default=-1)
        assert consumer.head == next(iter(consumer.records()[::-1]), None)
        consumer.check_swept()
        _cycle(consumer)
        consumer.check()
        consumer.check_swept()


# -- failing calls ---------------------------------------------------------------------------


def fail_every_call(
    folder: Path,
    seed: int,
    error: Callable[[], BaseException] | None,
    *,
    kinds: tuple[str, ...] = Strike.kinds,
    lasting: bool = False,
    per_point: int | None = None,
) -> Counter[str]:
    """Fail the n-th file call of saving and retiring a checkpoint, for every n there is.

    `error` None: the n-th write is short, and the checkpoint is saved nevertheless. With `per_point`,
    the power is lost afterwards, too.
    """
    counts: Counter[str] = Counter()
    for turn in itertools.count(1):
        live = folder / f"turn-{turn}"
        live.mkdir(parents=True)
        files = RecordedFiles(live)
        consumer = Consumer(live / FOLDER, Journal(), random.Random(seed), files.mark)
        with files.watching(), named_by(seed):
            consumer.start()
            for _ in range(KEPT):
                _cycle(consumer)
            since = len(files.operations)
            struck = _fail(files, consumer, Strike(error, turn, kinds, lasting), counts)
        counts["runs"] += 1
        if per_point is not None:
            rng = random.Random(turn)
            for number, image in enumerate(images(files.operations, rng, per_point=per_point, since=since)):
                check_image(image, consumer, folder / f"image-{turn}-{number}", f"turn {turn}")
                counts["images"] += 1
        shutil.rmtree(live)
        if not struck:
            return counts
    raise AssertionError("unreachable")


def _fail(files: RecordedFiles, consumer: Consumer, strike: Strike, counts: Counter[str]) -> bool:
    """Save under the strike, then save again without; whether the strike met anything."""
    checkpoint = consumer.train()
    heads = consumer.records()
    files.arm(strike)
    refused: CheckpointError | None = None
    try:
        consumer.save(checkpoint)
        consumer.retire()
    except CheckpointError as error:
        refused = error
    struck = files.struck
    files.arm(None)
    told = refused is not None and bool(refused.next)
    assert told == (struck and strike.error is not None), "a failed call must be told, and nothing else"
    counts["faults"] += struck
    with files.paused():
        consumer.check()
    if consumer.head in heads:
        consumer.save(checkpoint)
    consumer.retire()
    consumer.check_swept()
    consumer.start()
    assert consumer.reports == []
    assert consumer.written[consumer.head] == checkpoint  # type: ignore[index]
    _cycle(consumer)
    consumer.check()
    return struck
