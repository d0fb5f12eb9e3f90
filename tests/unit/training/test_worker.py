"""Two ranks in one process: a step happens on both of them or on none."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from paceline.durable_files import FileContent
from paceline.errors import TrainingError
from paceline.features.stores.refusals import missing
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.records import State
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.loader import LoaderSettings, StepLoader
from paceline.testing.light_adapters import InMemoryLightFeatureStore, id_of
from paceline.testing.light_run import RUN_ID, RunShape, build_producer, expected_steps, uninterrupted
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.coordinator import Coordinator
from paceline.training.learner import Sample
from paceline.training.recovery import recover
from paceline.training.trainer import Trainer
from paceline.training.worker import FIRST_WEIGHTS, Fetched, Ranks, StepOrder, Worker
from paceline.types import SampleRef

SHAPE = RunShape(prompts=12, group=4, batch=4, interval=2)
WAIT_S = 60.0


class Exchange:
    """Adds up the ranks' gradients; if one of them has none, no rank gets any."""

    def __init__(self, ranks: int) -> None:
        self.given: list[float | None] = [None] * ranks
        self._all_there = threading.Barrier(ranks)

    def sum(self, rank: int, gradient: float | None) -> float:
        self.given[rank] = gradient
        self._all_there.wait(WAIT_S)
        given = list(self.given)
        self._all_there.wait(WAIT_S)
        if None in given:
            raise TrainingError(f"Rank {given.index(None)} has no gradient.")
        return sum(g for g in given if g is not None)


class SummingLearner:
    """Its weight moves by the mean number of the samples that all ranks train; a sample counts 2 tokens."""

    def __init__(self, rank: int, exchange: Exchange, bad: Sequence[str] = ()) -> None:
        self.weight: float | None = None
        self.steps: list[tuple[int, list[str], int | None]] = []
        self._rank = rank
        self._exchange = exchange
        self._bad = bad

    @property
    def ready(self) -> bool:
        return self.weight is not None

    def num_tokens(self, samples: Sequence[Sample]) -> int:
        return 2 * len(samples)

    def build(self, samples: Sequence[Sample]) -> None:
        self.weight = float(len(samples))

    def step(self, step: int, samples: Sequence[Sample], num_tokens: int | None = None) -> dict[str, Any]:
        try:
            self.attempt(samples)
            gradient = 2.0 * sum(number(id_of(sample)) for sample in samples)
        except TrainingError:
            gradient = None
        total = self._exchange.sum(self._rank, gradient)
        assert self.weight is not None
        assert num_tokens is not None
        self.weight += total / num_tokens
        self.steps.append((step, [id_of(sample) for sample in samples], num_tokens))
        return {"loss": self.weight}

    def check_greedy(self, samples: Sequence[Sample]) -> None:
        """It has no target."""

    def attempt(self, samples: Sequence[Sample], step: int = 0) -> None:
        for sample in samples:
            if id_of(sample) in self._bad:
                raise TrainingError(f"The loss of {id_of(sample)} is NaN.")

    def probe(self, like: Sample) -> None:
        """It can always add."""

    def files(self) -> dict[str, bytes]:
        return {f"weight-{self._rank}": repr(self.weight).encode()}

    def load(self, files: Mapping[str, FileContent]) -> None:
        self.weight = float(bytes(files[f"weight-{self._rank}"]))

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

    def get(self, ref: SampleRef) -> dict[str, Any]:
        self.reads.append(ref.sample_id)
        if ref.sample_id in self.lost:
            self.lost.remove(ref.sample_id)
            raise missing(ref, "this rank does not find them")
        return self._features.get(ref)


class TwoRanks:
    """A run with all its samples captured, and two ranks over it."""

    def __init__(self, folder: Path, bad: Sequence[str] = ()) -> None:
        self.ledger = SQLiteLedger()
        self.features = InMemoryLightFeatureStore(SHAPE.budget_bytes)
        build_producer(SHAPE, self.ledger, self.features).run()
        exchange = Exchange(2)
        self.learners = [SummingLearner(rank, exchange, bad) for rank in range(2)]
        self.views = [Blind(self.features) for _ in range(2)]
        workers = [Worker(learner, view) for learner, view in zip(self.learners, self.views, strict=True)]
        self.ranks = Ranks(workers)
        self.folder = CheckpointFolder(folder, RUN_ID)
        session = ConsumerSession(self.ledger, RUN_ID)
        start = recover(session, self.folder, lambda *_, **__: None)
        settings = SHAPE.settings()
        coordinator = Coordinator(session, self.features, self.folder, self.ranks, start, settings)
        self.trainer = Trainer(coordinator, self.ranks, settings)
        loading = LoaderSettings(SHAPE.batch, SHAPE.passes, SHAPE.group)
        self.loader = StepLoader(session, loading, on_wait=coordinator.before_wait)

    @property
    def refs(self) -> list[SampleRef]:
        return [entry.ref for entry in self.ledger.read(0, 99).entries]


def test_an_order_is_all_that_a_rank_needs_to_know(tmp_path: Path) -> None:
    """It fetches its own slice, counts it, and holds it; the same order again reads nothing."""
    run = TwoRanks(tmp_path)
    worker, view = run.ranks.workers[1], run.views[1]
    order = StepOrder(step=7, rev=0, refs=tuple(run.refs[:4]), start=2, stop=4)
    assert worker.fetch(order) == Fetched(num_tokens=4)
    assert worker.fetch(order) == Fetched(num_tokens=4)
    assert view.reads == ["light:2", "light:3"]


def test_what_one_rank_cannot_fetch_leaves_both_unchanged(tmp_path: Path) -> None:
    """The answer names it; nothing was trained anywhere, and the step is trained once it is there."""
    run = TwoRanks(tmp_path)
    assert run.ranks.fetch(FIRST_WEIGHTS, 0, run.refs[:4]) == {}
    run.ranks.build()
    run.views[1].lost = {"light:7"}
    assert list(run.ranks.fetch(1, 0, run.refs[4:8])) == ["light:7"]
    assert [learner.weight for learner in run.learners] == [4.0, 4.0]
    assert [learner.steps for learner in run.learners] == [[], []]
    assert run.ranks.fetch(1, 0, run.refs[4:8]) == {}
    run.ranks.step()
    assert [learner.weight for learner in run.learners] == [4.0 + (4 + 5 + 6 + 7) / 4] * 2


def test_what_fails_on_one_rank_happens_on_none(tmp_path: Path) -> None:
    """The exchange of gradients comes before any weight changes."""
    run = TwoRanks(tmp_path, bad=["light:3"])
    run.ranks.fetch(FIRST_WEIGHTS, 0, run.refs[:3])
    run.ranks.build()
    run.ranks.fetch(1, 0, run.refs[:4])
    with pytest.raises(TrainingError):
        run.ranks.step()
    assert [learner.weight for learner in run.learners] == [3.0, 3.0]
    assert [learner.steps for learner in run.learners] == [[], []]


def test_a_run_of_two_ranks_trains_every_sample_once_on_one_of_them(tmp_path: Path) -> None:
    """Each step is divided by the tokens of both; the one head checkpoint holds the parts of both."""
    run = TwoRanks(tmp_path)
    assert run.trainer.fit(run.loader) == 3
    first, second = (learner.steps for learner in run.learners)
    assert [ids for _, ids, _ in first] == [[f"light:{n}", f"light:{n + 1}"] for n in (0, 4, 8)]
    assert [ids for _, ids, _ in second] == [[f"light:{n}", f"light:{n + 1}"] for n in (2, 6, 10)]
    assert {tokens for _, _, tokens in [*first, *second]} == {8}
    head = run.folder.read(run.ledger.snapshot().checkpoints[-1])
    assert set(head.files) == {"weight-0", "weight-1"}
    assert run.learners[0].weight == run.learners[1].weight
    assert run.features.usage().resident_samples == 0


def test_a_culprit_on_one_rank_is_quarantined_and_its_step_trained_on_both(tmp_path: Path) -> None:
    """Isolation asks all ranks; the step without it is cut into slices anew."""
    run = TwoRanks(tmp_path, bad=["light:6"])
    assert run.trainer.fit(run.loader) == 3
    assert [sample.sample_id for sample in run.ledger.find(state=State.QUARANTINED).values()] == ["light:6"]
    steps = [step for learner in run.learners for step in learner.steps if step[0] == 2]
    assert [ids for _, ids, _ in steps] == [["light:4"], ["light:5", "light:7"]]
    assert {tokens for _, _, tokens in steps} == {6}
    assert run.learners[0].weight == run.learners[1].weight


def test_a_sample_that_a_step_visits_twice_is_trained_twice(tmp_path: Path) -> None:
    """With batches larger than groups, two passes meet in one step; the sample is read once."""
    shape = RunShape(prompts=8, group=2, batch=4, passes=2)
    assert expected_steps(shape)[0].count("light:0") == 2
    assert uninterrupted(shape, tmp_path).trained == expected_steps(shape)
