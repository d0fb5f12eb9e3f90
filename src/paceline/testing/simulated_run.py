"""The shape of a simulated run, and the product's classes joined over simulated parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from time import monotonic
from typing import Any

from paceline.capture.backpressure import Backpressure, Watermarks, check_feasible
from paceline.capture.neighbours import Neighbours
from paceline.capture.producer import Producer
from paceline.capture.settings import CaptureSettings
from paceline.data.source import PromptList
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.producer_session import ProducerSession
from paceline.loader.loader import StepLoader
from paceline.loader.settings import LoaderSettings
from paceline.testing.light_adapters import (
    LIGHT_FEATURES,
    SAMPLE_BYTES,
    HashLearner,
    LightEngine,
    uneven_length,
)
from paceline.training.settings import CheckpointSection, TrainerSettings
from paceline.training.trainer import ConsumerSide, Trainer, take_over
from paceline.types import PromptTask

RUN_ID = "light"
SHORTEST = uneven_length(f"{RUN_ID}:0")


@dataclass(frozen=True)
class Shape:
    """What decides the weights of a run, how often it checkpoints, and how much room it has.

    `spare`: samples of room beyond the least that is allowed; None: all that anyone could want.
    `patience_s`: how long a consumer waits for a lost sample before it stops. `producers`: how many there
    are at a time. `timeout_s`: after which a silent producer is taken for dead by the others. `tokens`: see
    `RunShape`.
    """

    prompts: int = 12
    group: int = 3
    batch: int = 3
    passes: int = 1
    interval: int = 2
    spare: int | None = None
    patience_s: float = 1800.0
    producers: int = 1
    timeout_s: float = 3600.0
    tokens: int | None = None

    @property
    def window(self) -> int:
        step = self.batch if self.tokens is None else self.tokens // SHORTEST + 2
        return max((self.passes + 1) * self.group + step, self.group)

    @property
    def least_samples(self) -> int:
        return -(-(self.group + self.window) * 4 // 3) + 1

    @property
    def budget_samples(self) -> int | None:
        return None if self.spare is None else self.least_samples + self.spare

    @property
    def budget_bytes(self) -> int:
        return 64 * SAMPLE_BYTES * (self.group + self.window)

    @property
    def sample_ids(self) -> list[str]:
        return [f"{RUN_ID}:{n}" for n in range(self.prompts)]

    @property
    def weights_only(self) -> Shape:
        """The part that decides the weights."""
        return Shape(self.prompts, self.group, self.batch, self.passes, interval=1, tokens=self.tokens)

    def engine(self, refuses: Callable[[Sequence[str]], None] | None = None) -> LightEngine:
        return LightEngine(refuses, uneven=self.tokens is not None)

    def tasks(self) -> list[PromptTask]:
        return [PromptTask(str(n), RUN_ID, "prompts", {"prompt_ids": [n]}, n) for n in range(self.prompts)]


def simulated_producer(
    shape: Shape,
    worker: str,
    ledger: Any,
    features: Any,
    engine: LightEngine,
    report: Callable[..., None],
    clock: Callable[[], float] = monotonic,
) -> Producer:
    budget = features.usage().budget_bytes
    check_feasible(
        budget_bytes=budget,
        sample_bytes=SAMPLE_BYTES,
        group_size=shape.group,
        window_size=shape.window,
        budget_samples=shape.budget_samples,
    )
    marks = Watermarks(
        budget_bytes=budget,
        group_bytes=shape.group * SAMPLE_BYTES,
        budget_samples=shape.budget_samples,
        group_samples=shape.group,
        window_samples=shape.window,
    )
    session = ProducerSession(ledger, RUN_ID, worker, attempt_max=3)
    settings = CaptureSettings(group_size=shape.group, max_answer_tokens=4, features=LIGHT_FEATURES)
    pressure = Backpressure(features, session, marks, report=report, clock=clock)
    source = PromptList(shape.tasks())
    producer = Producer(session, engine, features, source, settings, pressure, report=report)
    if shape.producers > 1:
        producer.meet(
            Neighbours(
                session,
                timeout_s=shape.timeout_s,
                group_size=shape.group,
                groups_ahead=marks.groups_ahead,
                in_background=False,
                report=report,
                clock=clock,
            )
        )
    return producer


def simulated_consumer(
    shape: Shape,
    ledger: Any,
    features: Any,
    folder: Any,
    learner: HashLearner,
    executor: Executor,
    report: Callable[..., None],
    clock: Callable[[], float] = monotonic,
) -> tuple[Trainer, StepLoader]:
    settings = TrainerSettings(
        total_steps=1,
        first_samples=shape.group,
        checkpoint=CheckpointSection(interval_steps=shape.interval),
    )
    side = ConsumerSide(ConsumerSession(ledger, RUN_ID), features, folder, learner)
    loading = LoaderSettings(
        shape.batch,
        shape.passes,
        shape.group,
        recapture_timeout_s=shape.patience_s,
        tokens_per_step=shape.tokens,
        size=shape.prompts,
    )
    return take_over(side, settings, loading, executor=executor, report=report, clock=clock)
