"""`Worker` is one rank that trains. ranks.py is all ranks of a run, as the coordinator calls them.

A rank gets the planned step as a plain record, `StepOrder`. It reads its slice of the step's samples and
answers `Fetched`: that it holds them, or which of them it cannot read. No rank trains before all ranks hold
their slices, so a step happens on all ranks or on none. A rank does not use the ledger or torch: the learner
owns the weights (learner.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import FeatureCorruptError, FeatureMissingError, StoreError
from paceline.features.store import FeatureStore
from paceline.loader.packing import shares
from paceline.loader.read_ahead import ReadAhead
from paceline.training.learner import Learner, Sample
from paceline.types import SampleRef

FIRST_WEIGHTS = 0  # the step number of an order to build the first weights


@dataclass(frozen=True)
class StepOrder:
    """The step, its samples in plan order, and one rank's slice of them."""

    step: int
    rev: int
    refs: tuple[SampleRef, ...]
    start: int
    stop: int
    progress: float | None = None  # see PlannedStep

    @classmethod
    def of(
        cls,
        step: int,
        rev: int,
        refs: Sequence[SampleRef],
        rank: int,
        ranks: int,
        progress: float | None = None,
    ) -> StepOrder:
        """The order of one of so many ranks, a pure function of the step."""
        return cls(step, rev, tuple(refs), *slice_of(refs, rank, ranks), progress)

    @property
    def mine(self) -> tuple[SampleRef, ...]:
        return self.refs[self.start : self.stop]


def slice_of(refs: Sequence[SampleRef], rank: int, ranks: int) -> tuple[int, int]:
    """Begin and end of the rank's part of a step's samples; parts have about the same number of tokens."""
    return shares([ref.num_tokens for ref in refs], ranks)[rank]


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
        self._features = features
        self._get_many = getattr(features, "get_many", None)
        self._ahead = ReadAhead(self._read, executor, self._get_many and self._read_many)
        self._held: dict[str, tuple[SampleRef, Sample]] = {}
        self._trained_well: list[Sample] = []

    def fetch(self, order: StepOrder) -> Fetched:
        """Read the slice of `order`, except samples that are held already; all or nothing is held then."""
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
            self._held = {}  # at the next try it shows anew that it can read the others
            return Fetched(0, unreadable)
        return Fetched(self.learner.num_tokens(self._samples(order.mine)))

    def _read(self, ref: SampleRef) -> Sample:
        return self.learner.opened(self._features.get(ref))

    def _read_many(self, refs: Sequence[SampleRef]) -> list[Sample | StoreError]:
        assert self._get_many is not None, "the store has it"
        found = self._get_many(refs)
        return [one if isinstance(one, StoreError) else self.learner.opened(one) for one in found]

    def read_ahead(self, refs: Sequence[SampleRef]) -> None:
        """Start to read the samples that the next order will probably name."""
        self._ahead.start(refs)

    def step(self, order: StepOrder, num_tokens: int) -> dict[str, Any]:
        """Train the slice; `num_tokens`: of the whole step. Returns figures for the event log."""
        samples = self._samples(order.mine)
        figures = self.learner.step(order.step, samples, num_tokens, order.progress)
        self._trained_well = samples[:1] or self._trained_well  # a short step has none for some ranks
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
            return
        with self.learner.gathered():
            if samples:
                self.learner.attempt(samples, order.step)

    def probe(self, order: StepOrder) -> bool:
        """Raise if weights or machine cannot train any sample; whether a real sample was trained."""
        with self.learner.gathered():
            return self._probe(order)

    def _probe(self, order: StepOrder) -> bool:
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
