"""`Ranks` is all ranks of a run, as the coordinator on rank 0 calls them; `Follower` is another rank's life.

The planned step is the message between them. Each rank reads its own slice from the feature store, so no
feature passes through rank 0. Every call is answered by all ranks in a meeting, so that all of them go on
together, and one that is lost or late ends it for all (link.py). With one rank nothing is written or sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec

from paceline.durable_files import FileContent
from paceline.errors import RanksError, StoreError
from paceline.ledger.records import CheckpointRecord
from paceline.training.checkpoint import FileEntry
from paceline.training.link import Alone, Link, meet
from paceline.training.part_writing import PartsOfOthers, PartWriter, WrittenPart
from paceline.training.told_errors import ToldError, raised_again, told
from paceline.training.worker import FIRST_WEIGHTS, Fetched, StepOrder, Worker, slice_of
from paceline.types import SampleRef, ref_from_json, ref_to_json

BEGIN, BEAT, FETCH, STEP, ATTEMPT, PROBE = "begin", "beat", "fetch", "step", "attempt", "probe"
LOAD, FILES, END = "load", "files", "end"
BEAT_S = 1.0


class Message(msgspec.Struct, omit_defaults=True):
    """From rank 0 to all others: what to do, with what it takes.

    `ahead`: the samples that the next step will probably name, to be read while this one trains. `sizes`: of
    the files that follow, in bytes. `folder`: where every rank writes or reads its part of a checkpoint;
    `digest`: of that checkpoint's manifest. `patience_s`: see `Ranks.beat`.
    """

    do: str
    step: int = 0
    rev: int = 0
    refs: list[msgspec.Raw] = []
    ahead: list[msgspec.Raw] = []
    num_tokens: int = 0
    sample_ids: list[str] = []
    sizes: dict[str, int] = {}
    folder: str = ""
    digest: str = ""
    patience_s: float = 0.0
    progress: float | None = None
    about: dict[str, Any] = {}


class Answer(msgspec.Struct, omit_defaults=True):
    """From every rank to all: what came of it. `stops`: this rank's process is asked to stop. `part`: what it
    has written of a checkpoint since its last answer."""

    num_tokens: int = 0
    unreadable: dict[str, ToldError] = {}
    trained_before: bool = False
    files: dict[str, bytes] = {}
    fingerprint: str = ""
    error: ToldError | None = None
    stops: bool = False
    part: WrittenPart | None = None


class Ranks:
    """After a `fetch` without unreadable samples the ranks hold that step, and later calls are about it.

    Every call raises RanksError if a rank is lost; then the weights of this attempt are given up.
    """

    def __init__(self, worker: Worker, link: Link | None = None) -> None:
        """`worker`: rank 0's own."""
        self.worker = worker
        self.asked_to_stop = False  # a process of some rank is asked to
        self._link = link or Alone()
        self._order: StepOrder | None = None
        self._num_tokens = 0
        self._ahead: Sequence[SampleRef] = ()
        self._parts = PartsOfOthers(self.size)

    @property
    def size(self) -> int:
        return self._link.size

    @property
    def are_sharded(self) -> bool:
        """Whether each rank holds a part of the weights and of the optimizer, and writes it itself."""
        return self.size > 1 and self.worker.learner.is_sharded

    @property
    def ready(self) -> bool:
        """Whether the ranks have weights."""
        return self.worker.learner.ready

    # -- the training as a whole -----------------------------------------------------------

    def begin(self, **about: Any) -> None:
        """Tell the others what they need to know, before anything else."""
        if self.size > 1:
            self._meet(Message(BEGIN, about=about), Answer())

    def beat(self, patience_s: float = 0.0) -> None:
        """Rank 0 waits for something else, and lives; so do the others.

        `patience_s`: how long the others may wait with their answers for the parts that they write.
        """
        if self.size > 1:
            self._meet(Message(BEAT, patience_s=patience_s), Answer())

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """The others hear that rank 0 lives while it does, perhaps for long, what they have no part in."""
        if self.size == 1:
            yield
            return
        done, failures = threading.Event(), list[Exception]()

        def beat() -> None:
            try:
                while not done.wait(BEAT_S):
                    self.beat()
            except Exception as error:  # noqa: BLE001 (raised again in the caller's thread)
                failures.append(error)

        thread = threading.Thread(target=beat, name="paceline-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if failures:
            raise failures[0]

    def end(self) -> None:
        """The others end in good order."""
        dismiss(self._link)

    # -- a step ----------------------------------------------------------------------------

    def fetch(
        self, step: int, rev: int, refs: Sequence[SampleRef], progress: float | None = None
    ) -> dict[str, StoreError]:
        """Every rank reads its slice; for the first weights rank 0 reads all. Returns the unreadable ones.

        `progress`: see `PlannedStep`.
        """
        if step == FIRST_WEIGHTS:
            self._order = StepOrder.of(step, rev, refs, 0, 1)
            with self._beating():
                return dict(self.worker.fetch(self._order).unreadable)
        self._order = order = StepOrder.of(step, rev, refs, 0, self.size, progress)
        if self.size == 1:
            fetched = self.worker.fetch(order)
            self._num_tokens = fetched.num_tokens
            return dict(fetched.unreadable)
        message = Message(FETCH, step, rev, refs=_packed(refs), progress=progress)
        answers = self._all(message, lambda: _of_fetched(self.worker.fetch(order)))
        self._num_tokens = sum(answer.num_tokens for answer in answers)
        unreadable: dict[str, StoreError] = {}
        for rank, answer in enumerate(answers):
            for sample_id, record in answer.unreadable.items():
                error = raised_again(record, rank)
                unreadable[sample_id] = error if isinstance(error, StoreError) else StoreError(str(error))
        return unreadable

    def read_ahead(self, refs: Sequence[SampleRef]) -> None:
        """Each rank begins to read its slice when the step that all hold begins."""
        self._ahead = refs
        start, stop = slice_of(refs, 0, self.size)
        self.worker.read_ahead(refs[start:stop])

    def step(self) -> dict[str, Any]:
        """One optimizer step on all ranks. If it raises, the weights of all ranks are unchanged."""
        order, figures = self._held, dict[str, Any]()

        def act() -> Answer:
            figures.update(self.worker.step(order, self._num_tokens))
            return Answer()

        message = Message(
            STEP, order.step, num_tokens=self._num_tokens, ahead=_packed(self._ahead, self.size)
        )
        self._ahead = ()
        self._all(message, act)
        return figures

    def build(self) -> None:
        """The first weights, on rank 0; the others get a copy, of which each keeps its part if sharded."""
        with self._beating():
            self.worker.build(self._held)
        if self.size > 1:
            self._send(self.worker.learner.files())

    def attempt(self, sample_ids: Collection[str]) -> None:
        """Try these of the step's samples without changing the weights; raises what training them would."""
        order = self._held
        if order.step == FIRST_WEIGHTS:
            with self._beating():
                self.worker.attempt(order, sample_ids)
            return

        def act() -> Answer:
            self.worker.attempt(order, sample_ids)
            return Answer()

        self._all(Message(ATTEMPT, sample_ids=list(sample_ids)), act)

    def probe(self) -> bool:
        """Raise if weights or machines cannot train any sample; whether real samples were trained."""
        order = self._held
        if order.step == FIRST_WEIGHTS:
            return self.worker.probe(order)
        answers = self._all(Message(PROBE), lambda: Answer(trained_before=self.worker.probe(order)))
        return all(answer.trained_before for answer in answers)

    def has_a_rank_with_only(self, sample_ids: Collection[str]) -> bool:
        """Whether some rank holds samples of the step, and none besides these."""
        return bool(self.with_only(sample_ids))

    def with_only(self, sample_ids: Collection[str]) -> set[int]:
        """The ranks that read samples of the step, and none besides these."""
        refs, asked = self._held.refs, set(sample_ids)
        readers = (
            1 if self._held.step == FIRST_WEIGHTS else self.size
        )  # of the first weights rank 0 reads all
        slices = (slice_of(refs, rank, readers) for rank in range(readers))
        mine = [{ref.sample_id for ref in refs[start:stop]} for start, stop in slices]
        return {rank for rank, ids in enumerate(mine) if ids and ids <= asked}

    @property
    def _held(self) -> StepOrder:
        assert self._order is not None, "fetch comes first"
        return self._order

    # -- checkpoints -----------------------------------------------------------------------

    def load(self, files: Mapping[str, FileContent], record: CheckpointRecord) -> None:
        """Go on from a checkpoint, of any number of ranks, sharded or not."""
        if self.are_sharded:
            message = Message(LOAD, folder=record.name, digest=record.manifest_digest)
            self._all(message, partial(self._load_part, files))
            return
        if self.size == 1:
            self.worker.learner.load(files)
            return
        held = {name: files[name] for name in files}
        self.worker.learner.load(held)
        self._send(held)

    def _load_part(self, files: Mapping[str, FileContent]) -> Answer:
        self.worker.learner.load(files)
        return Answer()

    def parts(self, aside: str) -> Mapping[str, FileContent]:
        """A copy of rank 0's part of the state; the others have copied theirs, and write them to `aside`."""
        self._parts = PartsOfOthers(self.size)
        own: dict[str, FileContent] = {}

        def act() -> Answer:
            own.update(self.worker.learner.files())
            return Answer()

        self._all(Message(FILES, folder=aside), act)
        return own

    def written(self) -> Mapping[str, FileEntry] | None:
        """What the other ranks have written since `parts`; None before all have. Raises CheckpointError."""
        return self._parts.entries()

    def files(self) -> Mapping[str, FileContent]:
        """A copy of the state of all ranks, as files of a checkpoint; valid until the next call.

        Raises RanksError if the ranks' weights differ.
        """
        learner = self.worker.learner
        if self.size == 1:
            return learner.files()
        own: dict[str, FileContent] = {}

        def act() -> Answer:
            own.update(learner.files())
            return Answer(fingerprint=learner.fingerprint())

        answers = self._all(Message(FILES), act)
        odd = [rank for rank, answer in enumerate(answers) if answer.fingerprint != answers[0].fingerprint]
        if odd:
            raise RanksError(
                f"The weights of rank {odd[0]} differ from those of rank 0 at a checkpoint.",
                why="All ranks train the same weights, bit for bit, so a machine has computed wrongly. This "
                "checkpoint was not written.",
                next="run the same command again; it goes on from the checkpoint before. If it comes again, "
                "look at that rank's memory or device.",
            )
        return {**own, **{name: data for answer in answers[1:] for name, data in answer.files.items()}}

    def describe(self) -> dict[str, Any]:
        described = self.worker.learner.describe()
        return described if self.size == 1 else {**described, "ranks": self.size}

    def _send(self, files: Mapping[str, FileContent]) -> None:
        """The other ranks load this state."""
        message = Message(LOAD, sizes={name: len(content) for name, content in files.items()})

        def act() -> Answer:
            for content in files.values():
                self._link.copy(content, len(content))
            if self.are_sharded:  # rank 0 has the whole until here
                self.worker.learner.load(files)
            return Answer()

        self._all(message, act)

    # -- meetings --------------------------------------------------------------------------

    def _all(self, message: Message, act: Callable[[], Answer]) -> list[Answer]:
        """Every rank's answer. After all have ended, raises the error of the first rank that failed."""
        if self.size == 1:
            return [act()]
        self._link.tell(msgspec.json.encode(message))
        own = _answered(act)
        answers = self._met(message.do, own.answer)
        failed = [(rank, answer.error) for rank, answer in enumerate(answers) if answer.error is not None]
        if not failed:
            return answers
        rank, record = failed[0]
        error = own.error if rank == 0 and own.error is not None else raised_again(record, rank)
        if message.do == STEP and len(failed) < self.size:
            raise RanksError(
                f"Rank {rank} failed in step {message.step} after another rank had trained it ({error}).",
                why="The ranks' weights differ now, so this attempt is given up. Nothing of it was kept.",
                next="run the same command again; it goes on from the newest checkpoint.",
            ) from error
        raise error

    def _meet(self, message: Message, answer: Answer) -> None:
        self._link.tell(msgspec.json.encode(message))
        self._met(message.do, answer)

    def _met(self, do: str, answer: Answer) -> list[Answer]:
        said = meet(self._link, do, msgspec.json.encode(answer))
        answers = [msgspec.json.decode(one, type=Answer) for one in said]
        self.asked_to_stop = self.asked_to_stop or any(one.stops for one in answers)
        for rank, one in enumerate(answers):
            if one.part is not None:
                self._parts.hear(rank, one.part)
        return answers


def dismiss(link: Link) -> None:
    """On rank 0: the other ranks are not needed (any more)."""
    if link.size > 1:
        link.tell(msgspec.json.encode(Message(END)))


class Follower:
    """What a rank other than 0 does with each message."""

    def __init__(
        self,
        worker: Worker,
        link: Link,
        should_stop: Callable[[], bool],
        part_writer: PartWriter | None = None,
    ) -> None:
        """`part_writer`: of ranks that are sharded."""
        self._worker, self._link, self._should_stop = worker, link, should_stop
        self._part_writer = part_writer
        self._order: StepOrder | None = None
        self._acts: dict[str, Callable[[Message], Answer]] = {
            BEAT: lambda _: Answer(),
            FETCH: self._fetch,
            STEP: self._step,
            ATTEMPT: self._attempt,
            PROBE: lambda _: Answer(trained_before=worker.probe(self._held)),
            LOAD: self._load,
            FILES: self._files,
        }

    def follow(self) -> None:
        """Until rank 0 ends in good order. Raises RanksError."""
        while (message := _heard(self._link)).do != END:
            answer = _answered(partial(self._acts[message.do], message)).answer
            answer.stops = self._should_stop()
            if self._part_writer is not None:
                answer.part = self._part_writer.told(patience_s=message.patience_s)
            meet(self._link, message.do, msgspec.json.encode(answer))

    @property
    def _held(self) -> StepOrder:
        assert self._order is not None, "fetch comes first"
        return self._order

    def _fetch(self, message: Message) -> Answer:
        refs = _unpacked(message.refs)
        place = self._link.rank, self._link.size
        self._order = StepOrder.of(message.step, message.rev, refs, *place, message.progress)
        return _of_fetched(self._worker.fetch(self._order))

    def _step(self, message: Message) -> Answer:
        ahead = _unpacked(message.ahead)
        start, stop = slice_of(ahead, self._link.rank, self._link.size)
        self._worker.read_ahead(ahead[start:stop])
        self._worker.step(self._held, message.num_tokens)
        return Answer()

    def _attempt(self, message: Message) -> Answer:
        self._worker.attempt(self._held, message.sample_ids)
        return Answer()

    def _files(self, message: Message) -> Answer:
        learner = self._worker.learner
        if not message.folder:
            files = {name: bytes(content) for name, content in learner.files().items()}
            return Answer(files=files, fingerprint=learner.fingerprint())
        assert self._part_writer is not None
        self._part_writer.begin(message.folder, learner.files())
        return Answer()

    def _load(self, message: Message) -> Answer:
        if message.folder:
            assert self._part_writer is not None
            self._worker.learner.load(self._part_writer.read(message.folder, message.digest).files)
            return Answer()
        files = {name: self._link.copy(None, size) for name, size in message.sizes.items()}
        self._worker.learner.load(files)
        return Answer()


def hear_begin(link: Link) -> dict[str, Any] | None:
    """On a rank other than 0: what `Ranks.begin` told; None if the run needs no training."""
    message = _heard(link)
    if message.do == END:
        return None
    meet(link, message.do, msgspec.json.encode(Answer()))
    return message.about


class _Answered(msgspec.Struct):
    answer: Answer
    error: Any = None


def _answered(act: Callable[[], Answer]) -> _Answered:
    """The answer to give, also of an act that failed. Raises RanksError: then no rank is there to answer."""
    try:
        return _Answered(act())
    except RanksError:
        raise
    except Exception as error:  # noqa: BLE001 (rank 0 decides what it means)
        return _Answered(Answer(error=told(error)), error)


def _heard(link: Link) -> Message:
    return msgspec.json.decode(link.hear(), type=Message)


def _of_fetched(fetched: Fetched) -> Answer:
    unreadable = {sample_id: told(error) for sample_id, error in fetched.unreadable.items()}
    return Answer(num_tokens=fetched.num_tokens, unreadable=unreadable)


def _packed(refs: Sequence[SampleRef], ranks: int = 2) -> list[msgspec.Raw]:
    return [msgspec.Raw(ref_to_json(ref).encode()) for ref in refs] if ranks > 1 else []


def _unpacked(refs: Sequence[msgspec.Raw]) -> list[SampleRef]:
    return [ref_from_json(bytes(ref)) for ref in refs]
