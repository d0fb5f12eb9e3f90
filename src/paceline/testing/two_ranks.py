"""Two ranks over sockets, one in a thread, that add numbers: what becomes of a step is easy to see."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from paceline.durable_files import FileContent
from paceline.errors import RanksError, TrainingError
from paceline.features.stores.refusals import missing
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.settings import LoaderSettings
from paceline.parts import part_name, parts_of
from paceline.testing.light_adapters import InMemoryLightFeatureStore, id_of
from paceline.testing.light_run import RUN_ID, RunShape, build_producer
from paceline.testing.socket_link import SocketLink, socket_links
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.checkpoint_writer import InlineExecutor
from paceline.training.learner import DRAFT, Sample
from paceline.training.link import Link, meet
from paceline.training.part_writing import PartWriter
from paceline.training.ranks import Follower, hear_begin
from paceline.training.trainer import ConsumerSide, take_over
from paceline.training.worker import Worker
from paceline.types import SampleRef

SHAPE = RunShape(prompts=12, group=4, batch=4, interval=2)
WAIT_S = 60.0


class SummingLearner:
    """Its weight moves by the mean number of the samples that all ranks train; a sample counts 2 tokens."""

    def __init__(self, link: Link, bad: Sequence[str] = (), *, sharded: bool = False) -> None:
        """`sharded`: each rank has half of the weight, and meets the other where it gathers the whole."""
        self.is_sharded = sharded
        self.weight: float | None = None
        self.steps: list[tuple[int, list[str], int | None]] = []
        self.bad = bad
        self.breaks_late = False  # after the other ranks have taken its gradient
        self.breaks_after = 1 << 30  # steps, from which on its machine trains nothing
        self._link = link

    @property
    def ready(self) -> bool:
        return self.weight is not None

    def gathered(self) -> AbstractContextManager[None]:
        if self.is_sharded:
            meet(self._link, "gather", b"")
        return nullcontext()

    def opened(self, stored: Sample) -> Sample:
        return stored

    def num_tokens(self, samples: Sequence[Sample]) -> int:
        return 2 * len(samples)

    def build(self, samples: Sequence[Sample]) -> None:
        self.weight = float(len(samples))

    def step(
        self,
        step: int,
        samples: Sequence[Sample],
        num_tokens: int | None = None,
        progress: float | None = None,
    ) -> dict[str, Any]:
        try:
            self.attempt(samples)
            mine = str(2 * sum(number(id_of(sample)) for sample in samples))
        except TrainingError as error:
            mine = error.what
        said = [one.decode() for one in meet(self._link, f"step {step}", mine.encode())]
        for one in said:
            if not one.isdecimal():
                raise TrainingError(one)
        assert self.weight is not None
        assert num_tokens is not None
        if self.breaks_late:
            raise MemoryError
        self.weight += sum(map(int, said)) / num_tokens
        self.steps.append((step, [id_of(sample) for sample in samples], num_tokens))
        return {"loss": self.weight}

    def check_greedy(self, samples: Sequence[Sample]) -> None:
        """It has no target."""

    def attempt(self, samples: Sequence[Sample], step: int = 0) -> None:
        if len(self.steps) >= self.breaks_after:
            raise TrainingError("The loss of anything is NaN.")
        for sample in samples:
            if id_of(sample) in self.bad:
                raise TrainingError(f"The loss of {id_of(sample)} is NaN.")

    def probe(self, like: Sample) -> None:
        """It can always add."""

    def fingerprint(self) -> str:
        return repr(self.weight)

    def files(self) -> dict[str, bytes]:
        rank = self._link.rank
        if self.is_sharded and self.steps:
            assert self.weight is not None
            return {part_name(DRAFT, rank, self._link.size): repr(self.weight / 2).encode()}
        return {f"of-rank-{rank}": b"its own"} if rank else {"weight": repr(self.weight).encode()}

    def load(self, files: Mapping[str, FileContent]) -> None:
        if "weight" in files:
            self.weight = float(bytes(files["weight"]))
        else:
            self.weight = sum(float(bytes(files[name])) for name in parts_of(DRAFT, files))

    def describe(self) -> dict[str, Any]:
        return {}


def number(sample_id: str) -> int:
    return int(sample_id.partition(":")[2])


class Blind(InMemoryLightFeatureStore):
    """One rank's way to the features, on which it cannot find some of them for a while."""

    def __init__(self, features: InMemoryLightFeatureStore) -> None:
        self.lost: set[str] = set()
        self.reads: list[str] = []
        self._features = features
        self.uri, self.budget_bytes, self.held = features.uri, features.budget_bytes, features.held

    def get(self, ref: SampleRef) -> dict[str, Any]:
        self.reads.append(ref.sample_id)
        if ref.sample_id in self.lost:
            self.lost.remove(ref.sample_id)
            raise missing(ref, "this rank does not find them")
        return self._features.get(ref)


class TwoRanks:
    """A run with all its samples captured, and two ranks over it; rank 1 lives in a thread until `end`."""

    def __init__(
        self,
        folder: Path,
        bad: Sequence[str] = (),
        *,
        sharded: bool = False,
        before: TwoRanks | None = None,
        writer: PartWriter | None = None,
        executor: Executor | None = None,
    ) -> None:
        """`before`: whose run these go on with; `writer`: rank 1's, of its part; `executor`: rank 0's."""
        if before is None:
            self.ledger = SQLiteLedger()
            self.features = InMemoryLightFeatureStore(SHAPE.budget_bytes)
            build_producer(SHAPE, self.ledger, self.features).run()
        else:
            self.ledger, self.features = before.ledger, before.features
        self.links = socket_links(2, timeout_s=WAIT_S)
        self.learners = [SummingLearner(link, bad, sharded=sharded) for link in self.links]
        self.views = [Blind(self.features) for _ in range(2)]
        self.folder = CheckpointFolder(folder, RUN_ID)
        self.stops = False  # whether rank 1's process is asked to stop
        self.answers = threading.Event()  # set with each answer of rank 1
        self.told: dict[str, Any] | None = None  # what rank 1 heard first
        self.failure: RanksError | None = None
        self.events: list[str] = []
        writer = writer or PartWriter(1, self.folder, InlineExecutor())
        second = Worker(self.learners[1], self.views[1])
        self._thread = threading.Thread(target=self._follow, args=(second, writer), daemon=True)
        self._thread.start()
        self.trainer, self.loader = take_over(
            ConsumerSide(
                ConsumerSession(self.ledger, RUN_ID),
                self.views[0],
                self.folder,
                self.learners[0],
                self.links[0],
            ),
            SHAPE.settings(),
            LoaderSettings(SHAPE.batch, SHAPE.passes, SHAPE.group),
            executor=executor,
            report=lambda event, **_: self.events.append(event),
        )
        self.ranks = self.trainer.ranks

    def _follow(self, worker: Worker, writer: PartWriter) -> None:
        try:
            self.told = hear_begin(self.links[1])
            Follower(worker, self.links[1], self._asked, writer).follow()
        except RanksError as error:
            self.failure = error
        self.links[1].leave()

    def _asked(self) -> bool:
        self.answers.set()
        return self.stops

    def end(self) -> None:
        self.ranks.end()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def fail(self) -> RanksError:
        """Rank 0's process ends without a word; what becomes of rank 1."""
        self.links[0].leave()
        self._thread.join(WAIT_S)
        assert self.failure is not None
        return self.failure

    @property
    def refs(self) -> list[SampleRef]:
        return [entry.ref for entry in self.ledger.read(0, 99).entries]


@contextmanager
def closing_links(*links: SocketLink) -> Iterator[None]:
    try:
        yield
    finally:
        for link in links:
            link.leave()
