"""The ref channel and `replace_file` under power failures and failing file calls: seeded, counted.

From every image a reader must get every ref for which `publish_many` returned, in order, no ref that was
never published, and the next one published after any torn tail. `replace_file` must show the old bytes or
the new ones.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from paceline import durable_files
from paceline.compat.streaming_channel import StreamingRefChannel
from paceline.errors import LedgerError
from paceline.testing.file_images import images
from paceline.testing.recording_files import CODES, Killed, RecordedFiles, Strike, failing
from paceline.testing.samples import sample_ref

CHANNEL = Path("runs/run0/refs")
FILE = Path("evaluation.json")


@dataclass(frozen=True)
class Promise:
    """Of the channel: numbers published, counts of the consumed that may be read, whether it is closed."""

    published: tuple[int, ...] = ()
    consumed: tuple[int, ...] = (0,)
    closed: bool = False
    contents: tuple[bytes | None, ...] = (None,)  # that the replaced file may have


@dataclass
class Ends:
    """The writer and the reader of one channel, and a file that is replaced now and then."""

    place: Path
    rng: random.Random
    files: RecordedFiles
    promised: Promise = Promise()
    tried: set[int] = field(default_factory=set)
    tried_to_close: bool = False

    def promise(self, promised: Promise) -> None:
        self.promised = promised
        self.files.mark(promised)

    def start(self) -> None:
        self.writer = StreamingRefChannel(self.place / CHANNEL)
        self.reader = StreamingRefChannel(self.place / CHANNEL)

    def publish(self) -> None:
        first = max(self.tried, default=-1) + 1
        numbers = range(first, first + self.rng.randint(1, 4))
        if self.tried - set(self.promised.published) and self.rng.random() < 0.5:
            numbers = range(min(self.tried - set(self.promised.published)), first)  # once more
        self.tried |= set(numbers)
        self.writer.publish_many([sample_ref(number) for number in numbers])
        self.promise(replace(self.promised, published=(*self.promised.published, *numbers)))

    def consume(self) -> None:
        count = len(self.reader.poll(self.rng.randint(1, 5)))
        self.reader._consumed += count  # what mark_consumed(count) is about to write
        target = self.reader._consumed
        self.promise(replace(self.promised, consumed=(*self.promised.consumed, target)))
        self.reader.mark_consumed(0)
        self.promise(replace(self.promised, consumed=(target,)))

    def replace(self) -> None:
        content = self.rng.randbytes(self.rng.randint(0, 9000))
        self.promise(replace(self.promised, contents=(*self.promised.contents, content)))
        durable_files.replace_file(self.place / FILE, content)
        self.promise(replace(self.promised, contents=(content,)))

    def close(self) -> None:
        self.tried_to_close = True
        self.writer.close()
        self.promise(replace(self.promised, closed=True))

    def check(self) -> None:
        """What a new reader finds is what was promised, and perhaps what was tried since."""
        with self.files.paused():
            self._check()

    def _check(self) -> None:
        channel = StreamingRefChannel(self.place / CHANNEL)
        found = channel.poll()
        known = {sample_ref(number).sample_id: number for number in self.tried}
        numbers = [known[ref.sample_id] for ref in found]  # KeyError: nobody published it
        assert found == [sample_ref(number) for number in numbers]
        rest = iter(numbers)
        assert all(number in rest for number in self.promised.published), "a published ref is gone"
        assert channel.published == len(found)
        assert channel.consumed_remote() in self.promised.consumed
        assert self.promised.closed <= channel.is_closed() <= self.tried_to_close
        content = (self.place / FILE).read_bytes() if (self.place / FILE).exists() else None
        assert content in self.promised.contents, "neither the old bytes nor the new ones"

    def go_on(self) -> None:
        """After the check: the next refs are read, behind whatever lies there."""
        if not StreamingRefChannel(self.place / CHANNEL).is_closed():
            self.start()
            before = self.writer.published
            self.writer.publish_many([sample_ref(998), sample_ref(999)])
            found = self.reader.poll()
            assert found[-2:] == [sample_ref(998), sample_ref(999)]
            # Whole records of a publish that did not return are read from now on, too.
            assert before + 2 <= self.writer.published == len(found)
            known = {sample_ref(number).sample_id for number in self.tried}
            assert {ref.sample_id for ref in found[:-2]} <= known
        durable_files.replace_file(self.place / FILE, b"new")
        assert (self.place / FILE).read_bytes() == b"new"


def lose_power(folder: Path, seed: int, *, rounds: int, per_point: int) -> Counter[str]:
    """Record a history with kills and failures in it, then look at every image of it."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    live = folder / "live"
    live.mkdir(parents=True)
    files = RecordedFiles(live)
    ends = Ends(live, rng, files)
    with files.watching():
        for turn in range(rounds):
            act = rng.choice((ends.publish, ends.publish, ends.consume, ends.replace))
            acts = [ends.close] if turn == rounds - 1 else [act]
            if not turn:
                acts = [ends.start]
            _survive(files, rng, acts, ends, counts)
    for number, image in enumerate(images(files.operations, rng, per_point=per_point)):
        with image.laid_out(folder / f"image-{number}", f"seed {seed}") as place:
            promised = image.note or Promise()
            found = Ends(place, rng, files, promised, set(ends.tried), tried_to_close=ends.tried_to_close)
            found.check()
            found.go_on()
        counts["images"] += 1
    return counts


def _survive(
    files: RecordedFiles,
    rng: random.Random,
    acts: list[Callable[[], None]],
    ends: Ends,
    counts: Counter[str],
) -> None:
    """Do them, perhaps with a kill or a failing disk; both ends start again after that."""
    trouble = rng.choice(("none", "none", "killed", "failing", "short"))
    error: Callable[[], BaseException] | None = None
    if trouble in ("killed", "failing"):
        error = Killed if trouble == "killed" else failing(rng.choice(list(CODES.values())))
    kinds = ("write",) if trouble == "short" else Strike.kinds
    if trouble != "none":
        files.arm(Strike(error, rng.randint(1, 8), kinds, lasting=trouble == "killed"))
    try:
        for act in acts:
            act()
    except (Killed, OSError, LedgerError) as refusal:
        assert files.struck, "only what was injected may fail"
        counts[type(refusal).__name__] += 1
        files.arm(None)
        ends.start()
    files.arm(None)
    ends.check()


def fail_every_call(
    folder: Path, error: Callable[[], BaseException] | None, *, kinds: tuple[str, ...] = Strike.kinds
) -> Counter[str]:
    """Fail the n-th file call of publishing, counting and replacing, for every n there is."""
    counts: Counter[str] = Counter()
    for turn in itertools.count(1):
        live = folder / f"turn-{turn}"
        live.mkdir(parents=True)
        files = RecordedFiles(live)
        ends = Ends(live, random.Random(0), files)
        with files.watching():
            ends.start()
            ends.publish()
            ends.replace()
            files.arm(Strike(error, turn, kinds))
            for act in (ends.publish, ends.consume, ends.replace, ends.close):
                try:
                    act()
                except (OSError, LedgerError):
                    assert files.struck
                ends.check()
            struck = files.struck
            files.arm(None)
            ends.go_on()
        counts["runs"] += 1
        counts["faults"] += struck
        if not struck:
            return counts
    raise AssertionError("unreachable")
