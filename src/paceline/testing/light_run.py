"""A whole run without torch, made of the product's own classes, in two processes or one.

Ledger, sessions, producer, loader, trainer, recovery and checkpoint folder are the real ones; engine,
features and weights are those of light_adapters.py. `produce` and `consume` do what the roles' processes
do (roles/producer.py, roles/consumer.py), except that they do not free the features at the end, so that
leftovers show. Every part has its kill points (kill_points.py). Whatever faults strike, a run ends in the
same 32 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline.capture.backpressure import Backpressure, Watermarks, check_feasible
from paceline.capture.neighbours import Neighbours
from paceline.capture.producer import Producer
from paceline.capture.settings import CaptureSettings
from paceline.data.source import PromptList
from paceline.errors import EngineError, TrainingError
from paceline.features.store import FeatureStore
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.facts import COMPLETED_STEP
from paceline.ledger.ledger import Ledger
from paceline.ledger.producer_session import WORKER, ProducerSession
from paceline.ledger.stores.redis import RedisLedger, RedisView
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.ledger.stores.sqlite.view import SQLiteView
from paceline.loader.loader import StepLoader
from paceline.loader.settings import LoaderSettings
from paceline.testing.kill_points import pointed
from paceline.testing.light_adapters import (
    LIGHT_FEATURES,
    SAMPLE_BYTES,
    HashLearner,
    InMemoryLightFeatureStore,
    LightEngine,
    LightFeatureStore,
    uneven_length,
)
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.link import Alone, Link
from paceline.training.ranks import Follower, dismiss, hear_begin
from paceline.training.settings import CheckpointSection, TrainerSettings
from paceline.training.trainer import ConsumerSide, Trainer, take_over
from paceline.training.worker import Worker
from paceline.types import PromptTask

RUN_ID = "light"
SHORTEST = uneven_length(f"{RUN_ID}:0")
ARCHIVE_FROM = 6  # so few samples are archived already, so that runs this small have an archive


@dataclass(frozen=True)
class RunShape:
    """What decides the weights of a light run, and how much room it has.

    `tight`: the fewest resident samples with which the run cannot wait for itself. `bad_prompt` is one
    the engine cannot bear, `bad_sample` one that cannot be trained (-1: none). `threads`: checkpoints are
    written and features read ahead in threads, as the consumer's process does it. `producers`, `ranks`: how
    many processes capture and train; the weights do not depend on them. `timeout_s`: a producer that is
    silent for so long is taken for dead by the others. `heartbeats`: a thread of each tells that it lives;
    without, that is told between two groups. `tokens`: a step holds so many, instead of `batch` samples, and
    samples differ in length.
    """

    prompts: int = 12
    group: int = 3
    batch: int = 3
    passes: int = 1
    interval: int = 2
    tight: bool = False
    kept: int = 2
    bad_prompt: int = -1
    bad_sample: int = -1
    threads: bool = False
    producers: int = 1
    timeout_s: float = 3600.0
    heartbeats: bool = False
    tokens: int | None = None
    ranks: int = 1

    @property
    def window(self) -> int:
        """As in roles/plan.py and roles/wire.py, with the shortest sample there is."""
        step = self.batch if self.tokens is None else self.tokens // SHORTEST + 2
        return max((self.passes + 1) * self.group + step, self.first_samples)

    @property
    def first_samples(self) -> int:
        return self.group

    @property
    def budget_samples(self) -> int | None:
        return -(-(self.group + self.window) * 4 // 3) + 1 if self.tight else None

    @property
    def budget_bytes(self) -> int:
        return 64 * SAMPLE_BYTES * (self.group + self.window)

    @property
    def sample_ids(self) -> list[str]:
        """In the order of the log."""
        return [f"{RUN_ID}:{n}" for n in range(self.prompts) if n != self.bad_prompt]

    def tasks(self) -> list[PromptTask]:
        payloads = [{"prompt_ids": [n % 256, n // 256]} for n in range(self.prompts)]
        return [PromptTask(str(n), RUN_ID, "prompts", p, n) for n, p in enumerate(payloads)]

    def engine(self) -> LightEngine:
        def refuse(sample_ids: Sequence[str]) -> None:
            if f"{RUN_ID}:{self.bad_prompt}" in sample_ids:
                raise EngineError("The target cannot bear this prompt.")

        return LightEngine(refuse, uneven=self.tokens is not None)

    def learner(self, link: Link | None = None) -> HashLearner:
        def refuse(sample_ids: Sequence[str]) -> None:
            if f"{RUN_ID}:{self.bad_sample}" in sample_ids:
                raise TrainingError("The loss is no number.")

        return HashLearner(refuse, link)

    def loading(self) -> LoaderSettings:
        return LoaderSettings(
            self.batch, self.passes, self.group, tokens_per_step=self.tokens, size=self.prompts
        )

    def settings(self) -> TrainerSettings:
        return TrainerSettings(
            total_steps=1,
            first_samples=self.first_samples,
            checkpoint=CheckpointSection(interval_steps=self.interval, keep=self.kept),
        )


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its weights, the samples of every step, and the chain of its head."""

    weights: bytes
    trained: list[list[str]]
    chain: str


def no_report(event: str, **fields: Any) -> None:
    """Discard the event."""


def build_producer(
    shape: RunShape,
    ledger: Ledger,
    features: FeatureStore,
    *,
    worker: str = WORKER,
    report: Callable[..., None] = no_report,
) -> Producer:
    marks = marks_of(shape, features)
    session = ProducerSession(ledger, RUN_ID, worker)
    settings = CaptureSettings(group_size=shape.group, max_answer_tokens=4, features=LIGHT_FEATURES)
    backpressure = Backpressure(features, session, marks, report=report)
    engine = pointed(shape.engine(), "engine")
    source = PromptList(shape.tasks())
    producer = Producer(session, engine, features, source, settings, backpressure, report=report)
    if shape.producers > 1:
        producer.meet(
            Neighbours(
                session,
                timeout_s=shape.timeout_s,
                group_size=shape.group,
                groups_ahead=marks.groups_ahead,
                in_background=shape.heartbeats,
                report=report,
            )
        )
    return producer


def marks_of(shape: RunShape, features: FeatureStore) -> Watermarks:
    budget = features.usage().budget_bytes
    check_feasible(
        budget_bytes=budget,
        sample_bytes=SAMPLE_BYTES,
        group_size=shape.group,
        window_size=shape.window,
        budget_samples=shape.budget_samples,
    )
    return Watermarks(
        budget_bytes=budget,
        group_bytes=shape.group * SAMPLE_BYTES,
        budget_samples=shape.budget_samples,
        group_samples=shape.group,
        window_samples=shape.window,
    )


def build_consumer(
    shape: RunShape,
    ledger: Ledger,
    features: FeatureStore,
    checkpoints: Path,
    *,
    executor: Executor | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[..., None] = no_report,
    link: Link | None = None,
) -> tuple[Trainer, StepLoader]:
    """`link`: to the other ranks, if there are any."""
    side = ConsumerSide(
        ConsumerSession(ledger, RUN_ID),
        features,
        pointed(CheckpointFolder(checkpoints, RUN_ID), "checkpoints"),
        pointed(shape.learner(link), "learner"),
        link,
    )
    return take_over(
        side, shape.settings(), shape.loading(), executor=executor, should_stop=should_stop, report=report
    )


class LightRun:
    """One run folder for two processes: ledger, checkpoints, features."""

    def __init__(self, folder: Path, shape: RunShape, server: str = "", patience_s: float = 60.0) -> None:
        """`server`: the URL of the server that the ledger is on, else it is a file; `patience_s`: with it."""
        self.folder = folder
        self.server, self.patience_s = server, patience_s
        self.name = folder.name  # of the ledger on the server
        self.shape = shape
        self.ledger_path = folder / "ledger.db"
        self.checkpoints = folder / "checkpoints"
        self.feature_folder = folder / "features"

    def open_ledger(self) -> RedisLedger | SQLiteLedger:
        bare: RedisLedger | SQLiteLedger
        if self.server:
            bare = RedisLedger(self.server, self.name, durability="head", patience_s=self.patience_s)
        else:
            bare = SQLiteLedger(self.ledger_path, durability="head")
        ledger: RedisLedger | SQLiteLedger = pointed(bare, "ledger")
        ledger.archive_from = ARCHIVE_FROM
        return ledger

    def view(self) -> RedisView | SQLiteView:
        """Raises PacelineError if there is no ledger yet."""
        if self.server:
            return RedisView(self.server, self.name, patience_s=self.patience_s)
        return SQLiteView(self.ledger_path)

    def open_features(self, *, owner: bool) -> LightFeatureStore:
        bare = LightFeatureStore(self.feature_folder, budget_bytes=self.shape.budget_bytes, owner=owner)
        features: LightFeatureStore = pointed(bare, "features")
        return features

    def produce(self, report: Callable[..., None] = no_report, worker: str = WORKER) -> None:
        """A producer's process."""
        ledger = self.open_ledger()
        if COMPLETED_STEP not in ledger.facts():
            report("found", intents=len(ledger.ownership().promised))
            features = self.open_features(owner=True)
            producer = build_producer(self.shape, ledger, features, worker=worker, report=report)
            producer.run(should_stop=lambda: COMPLETED_STEP in ledger.facts())
        ledger.close()

    def consume(self, report: Callable[..., None] = no_report, link: Link | None = None) -> None:
        """The consumer's process. `link`: to the other ranks, if there are any."""
        ledger = self.open_ledger()
        if COMPLETED_STEP in ledger.facts():
            dismiss(link or Alone())
        else:
            known = {record.name for record in ledger.snapshot().checkpoints}
            report("found", orphan_checkpoints=len(self.checkpoint_names() - known))
            features = self.open_features(owner=False)
            with ThreadPoolExecutor(2) if self.shape.threads else nullcontext() as executor:
                parts = self.shape, ledger, features, self.checkpoints
                trainer, loader = build_consumer(*parts, executor=executor, report=report, link=link)
                step = trainer.fit(loader)
            trainer.ranks.end()
            if loader.exhausted and ledger.snapshot().usage.waiting_samples == 0:
                trainer.session.set_facts({COMPLETED_STEP: step})
        ledger.close()

    def follow(self, link: Link) -> None:
        """The process of another rank."""
        if hear_begin(link) is None:
            return
        features = self.open_features(owner=False)
        with ThreadPoolExecutor(1) if self.shape.threads else nullcontext() as executor:
            worker = Worker(pointed(self.shape.learner(link), "learner"), features, executor)
            Follower(worker, link, lambda: False).follow()

    def checkpoint_names(self) -> set[str]:
        return {path.name for path in self.checkpoints.glob("step-*")}


def head_of(ledger: Ledger, checkpoints: Path) -> Outcome:
    """What the head checkpoint holds."""
    head = ledger.snapshot().head
    assert head is not None, "the run has a checkpoint"
    files = CheckpointFolder(checkpoints, RUN_ID).read(head).files
    return Outcome(bytes(files["weights.bin"]), json.loads(bytes(files["trained.json"])), head.chain)


def uninterrupted(shape: RunShape, folder: Path) -> Outcome:
    """The same run in one process, in memory: first everything is captured, then it is trained."""
    ledger = SQLiteLedger()
    # Weights do not depend on how much room there is, and one process cannot wait for itself.
    roomy = replace(shape, tight=False)
    features = InMemoryLightFeatureStore(shape.budget_bytes)
    build_producer(roomy, ledger, features).run()
    trainer, loader = build_consumer(roomy, ledger, features, folder)
    trainer.fit(loader)
    assert features.usage().resident_samples == 0, "nothing may stay behind"
    return head_of(ledger, folder)


def expected_steps(shape: RunShape) -> list[list[str]]:
    """Which samples each step trains, written down without the product: the order in passes.py."""
    groups = [range(i, min(i + shape.group, shape.prompts)) for i in range(0, shape.prompts, shape.group)]
    blocks = [[f"{RUN_ID}:{n}" for n in group if n != shape.bad_prompt] for group in groups]
    visits: list[str] = []
    for stage in range(len(blocks) + shape.passes - 1):
        window = [blocks[stage - age] for age in range(shape.passes) if 0 <= stage - age < len(blocks)]
        for place in range(shape.group):
            visits += [block[place] for block in window if place < len(block)]
    if shape.tokens is None:
        batches = [visits[i : i + shape.batch] for i in range(0, len(visits), shape.batch)]
    else:
        batches, room = [], 0
        for visit in visits:
            if not batches or uneven_length(visit) > room:
                batches, room = [*batches, []], shape.tokens
            batches[-1].append(visit)
            room -= uneven_length(visit)
    return [[i for i in batch if i != f"{RUN_ID}:{shape.bad_sample}"] for batch in batches]
