"""`Worker` is one rank that trains; `Ranks` is all ranks of a run, as the coordinator calls them.

The coordinator sends each rank one message a step, a plain record: `StepOrder`. The rank reads its slice of
the step's samples and answers `Fetched`: that it holds them, or which of them it cannot read. No rank trains
before all ranks hold their slices, so a step happens on all ranks or on none. A rank does not use the
ledger or torch: the learner owns the weights (learner.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from paceline.durable_files import FileContent
from paceline.errors import FeatureCorruptError, FeatureMissingError, StoreError
from paceline.features.store import FeatureStore
from paceline.loader.read_ahead import ReadAhead
from paceline.training.learner import Learner, Sample
from paceline.types import SampleRef

FIRST_WEIGHTS = 0  # the step number of an order to build the first weights
T = TypeVar("T")


@dataclass(frozen=True)
class StepOrder:
    """From the coordinator to one rank: the step, its samples in plan order, and this rank's slice."""

    step: int
    rev: int
    refs: tuple[SampleRef, ...]
    start: int
    stop: int

    @property
    def mine(self) -> tuple[SampleRef, ...]:
        return self.refs[self.start : self.stop]


@dataclass(frozen=True)
class Fetched:
    """A rank's answer: it holds its slice of `num_tokens` tokens, unless it cannot read a sample, and why."""

    num_tokens: int
    unreadable: Mapping[str, StoreError] = field(default_factory=dict)


class Worker:
    """One rank. It holds its slice of the samples of one order at a time."""

    def __init__(self, learner: Learner, features: FeatureStore, executor: Executor | None = None) -> None:
        """`executor`: reads the next step's features while the current one trains; None: no read-ahead."""
        self.learner = learner
        self._ahead = ReadAhead(features.get, executor)
        self._held: dict[str, tuple[SampleRef, Sample]] = {}
        self._trained_well: list[Sample] = []

    def fetch(self, order: StepOrder) -> Fetched:
        """Read the slice of `order`, except samples that are held already."""
        wanted = {ref.sample_id: ref for ref in order.mine}
        self._held = {i: held for i, held in self._held.items() if wanted.get(i) == held[0]}
        unreadable: dict[str, StoreError] = {}
        for sample_id, ref in wanted.items():
            if sample_id not in self._held:
                try:
                    self._held[sample_id] = ref, self._ahead.get(ref)
                except (FeatureMissingError, FeatureCorruptError) as error:
                    unreadable[sample_id] = error
        if unreadable:
            return Fetched(0, unreadable)
        return Fetched(self.learner.num_tokens(self._samples(order.mine)))

    def read_ahead(self, refs: Sequence[SampleRef]) -> None:
        """Start to read the samples that the next order will probably name."""
        self._ahead.start(refs)

    def step(self, order: StepOrder, num_tokens: int) -> dict[str, Any]:
        """Train the slice; `num_tokens`: of the whole step. Returns figures for the event log."""
        samples = self._samples(order.mine)
        figures = self.learner.step(order.step, samples, num_tokens)
        self._trained_well = samples[:1]
        return figures

    def build(self, order: StepOrder) -> None:
        """Build the first weights from all samples of the order."""
        self.learner.check_greedy(self._samples([ref for ref in order.refs if ref.metadata.get("greedy")]))
        self.learner.build(self._samples(order.refs))

    def attempt(self, order: StepOrder, sample_ids: Collection[str]) -> None:
        """Try the samples among these that this rank holds; the weights do not change."""
        mine = {ref.sample_id: ref for ref in order.mine if ref.sample_id in sample_ids}
        samples = self._samples(mine.values())
        if order.step == FIRST_WEIGHTS:
            self.learner.build(samples)
        elif samples:
            self.learner.attempt(samples, order.step)

    def probe(self, order: StepOrder) -> bool:
        """Raise if weights or machine cannot train any sample; whether a real sample was trained."""
        for sample in self._trained_well:
            try:
                self.learner.attempt([sample])
            except Exception:
                self.learner.probe(sample)  # it may name what is broken
                raise
            return True
        for ref in order.mine[:1]:
            self.learner.probe(self._held[ref.sample_id][1])
        return False

    def _samples(self, refs: Iterable[SampleRef]) -> list[Sample]:
        return [self._held[ref.sample_id][1] for ref in refs]


class Ranks:
    """All ranks of a run, in rank order; each call goes to all of them.

    After a `fetch` without unreadable samples the ranks hold that step, and later calls are about it.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)
        self._orders: list[StepOrder] = []
        self._num_tokens = 0
        # Ranks exchange gradients within a step, so they must run it at the same time.
        self._threads = ThreadPoolExecutor(len(workers)) if len(workers) > 1 else None

    @property
    def ready(self) -> bool:
        """Whether the ranks have weights."""
        return all(worker.learner.ready for worker in self.workers)

    def fetch(self, step: int, rev: int, refs: Sequence[SampleRef]) -> dict[str, StoreError]:
        """Every rank reads its slice, or all samples for the first weights; returns the unreadable ones."""
        bounds = self._slices(len(refs))
        if step == FIRST_WEIGHTS:
            bounds = [(0, len(refs)) for _ in bounds]
        self._orders = [StepOrder(step, rev, tuple(refs), start, stop) for start, stop in bounds]
        answers = self._each(lambda worker, order: worker.fetch(order))
        self._num_tokens = sum(answer.num_tokens for answer in answers)
        return {i: why for answer in answers for i, why in answer.unreadable.items()}

    def read_ahead(self, refs: Sequence[SampleRef]) -> None:
        for worker, (start, stop) in zip(self.workers, self._slices(len(refs)), strict=True):
            worker.read_ahead(refs[start:stop])

    def _slices(self, count: int) -> list[tuple[int, int]]:
        shares = len(self.workers)
        return [(rank * count // shares, (rank + 1) * count // shares) for rank in range(shares)]

    def step(self) -> dict[str, Any]:
        """One optimizer step on all ranks. If it raises, the weights of all ranks are unchanged."""
        return self._each(lambda worker, order: worker.step(order, self._num_tokens))[0]

    def build(self) -> None:
        self._each(lambda worker, order: worker.build(order))

    def attempt(self, sample_ids: Collection[str]) -> None:
        """Try these of the step's samples without changing the weights; raises what training them would."""
        self._each(lambda worker, order: worker.attempt(order, sample_ids))

    def probe(self) -> bool:
        """Raise if weights or machines cannot train any sample; whether real samples were trained."""
        return all(self._each(lambda worker, order: worker.probe(order)))

    def load(self, files: Mapping[str, FileContent]) -> None:
        for worker in self.workers:
            worker.learner.load(files)

    def files(self) -> Mapping[str, FileContent]:
        """A copy of the state of all ranks, as files of a checkpoint; valid until the next call."""
        return {n: content for worker in self.workers for n, content in worker.learner.files().items()}

    def describe(self) -> dict[str, Any]:
        return self.workers[0].learner.describe()

    def _each(self, act: Callable[[Worker, StepOrder], T]) -> list[T]:
        """Every rank's answer. After all have ended, raises the error of the first rank that failed."""
        pairs = list(zip(self.workers, self._orders, strict=True))
        if self._threads is None:
            return [act(worker, order) for worker, order in pairs]
        answers = [self._threads.submit(act, worker, order) for worker, order in pairs]
        wait(answers)
        return [answer.result() for answer in answers]
