"""The consumer's loop: plan, fetch, train, ack; and at intervals a checkpoint that makes it durable.

The coordinator records what happens (coordinator.py); the ranks own the weights (ranks.py). isolation.py
handles a step that fails, fetching.py samples that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from paceline.errors import TrainingError
from paceline.features.store import FeatureStore
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.records import State
from paceline.loader.loader import StepLoader
from paceline.loader.settings import LoaderSettings
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.coordinator import Coordinator
from paceline.training.fetching import Fetching
from paceline.training.isolation import Isolation
from paceline.training.learner import Learner
from paceline.training.link import Link
from paceline.training.rank_history import record_ranks
from paceline.training.ranks import Ranks
from paceline.training.recovery import recover
from paceline.training.settings import TrainerSettings
from paceline.training.worker import Worker


class Trainer:
    def __init__(
        self,
        coordinator: Coordinator,
        ranks: Ranks,
        settings: TrainerSettings,
        *,
        report: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        self.coordinator = coordinator
        self.ranks = ranks
        self._settings = settings
        self._report = report

    @property
    def session(self) -> ConsumerSession:
        return self.coordinator.session

    @property
    def step(self) -> int:
        """The last step that the weights contain."""
        return self.coordinator.step

    @property
    def draft(self) -> Any:
        """The draft, once there is one; a torch module with the torch learner."""
        return getattr(self.ranks.worker.learner, "draft", None)

    def checkpoint(self) -> None:
        """Write a checkpoint of this step, then free the features that it covers."""
        self.coordinator.checkpoint()

    def fit(self, loader: StepLoader) -> int:
        """Train to the end of the stream, `max_steps` or a stop, then checkpoint; returns the last step."""
        coordinator, settings = self.coordinator, self._settings
        fetching = Fetching(coordinator, self.ranks, loader)
        isolation = Isolation(coordinator, self.ranks, loader, fetching, self._report)
        if not self.ranks.ready and not self._make_first_weights(fetching, isolation):
            return self.step
        while settings.training.max_steps is None or self.step < settings.training.max_steps:
            if not self._train_next(loader, fetching, isolation):
                break
            if self.step % settings.checkpoint.interval_steps == 0:
                coordinator.begin_checkpoint()
            coordinator.relieve_pressure()
        coordinator.checkpoint()
        return self.step

    def _train_next(self, loader: StepLoader, fetching: Fetching, isolation: Isolation) -> bool:
        """Train one step; False if there is none, or after a stop."""
        began = monotonic()
        planned = loader.next_step(self.step + 1)
        held = fetching.hold(planned) if planned else None
        if held is None:
            return False
        self.ranks.read_ahead(loader.following())
        fetched = monotonic()
        outcome = isolation.train(held)
        if outcome is None:
            return False
        trained, figures = outcome
        self.coordinator.ack(trained)
        self._report(
            "step",
            step=trained.step,
            **figures,
            samples=len(trained.refs),
            **({} if trained.progress is None else {"progress": trained.progress}),
            wait_seconds=fetched - began,
            step_seconds=monotonic() - fetched,
            blocked_seconds=loader.blocked_seconds,
        )
        return True

    def _make_first_weights(self, fetching: Fetching, isolation: Isolation) -> bool:
        """Build the draft from the run's first samples and make it checkpoint 0; False if asked to stop."""
        is_built = False
        while not is_built:
            sample_ids = fetching.hold_first(self._settings.first_samples)
            if sample_ids is None:
                return False
            if not sample_ids:
                raise self._no_samples()
            self._report("first_weights", samples=len(sample_ids))
            is_built = isolation.build(sample_ids)
        self.coordinator.checkpoint()
        return True

    def _no_samples(self) -> TrainingError:
        ledger = self.session.ledger
        failed, quarantined = ledger.failed(), ledger.find(state=State.QUARANTINED).values()
        reasons = [*failed.values(), *(record.reason for record in quarantined)]
        return TrainingError(
            f"The stream has ended without a sample to train: {len(failed)} prompts failed and "
            f"{len(quarantined)} samples were quarantined{f' ({reasons[0]})' if reasons else ''}.",
            why="Without samples there are no first weights.",
            next="mend the cause (`paceline inspect RUN` shows the reasons) and start a new run.",
        )


@dataclass(frozen=True)
class ConsumerSide:
    """The parts of a consumer."""

    session: ConsumerSession
    features: FeatureStore
    checkpoints: CheckpointFolder
    learner: Learner
    link: Link | None = None  # to the other ranks, if there are any
    about: Mapping[str, Any] = field(default_factory=dict)  # what these are told before anything else


def take_over(
    side: ConsumerSide,
    settings: TrainerSettings,
    loading: LoaderSettings,
    *,
    executor: Executor | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[..., None] = lambda *_, **__: None,
    clock: Callable[[], float] = monotonic,
) -> tuple[Trainer, StepLoader]:
    """Become the run's consumer; returns trainer and loader, built from the start that recovery found.

    From here on an older consumer of the run is fenced. `executor`: writes checkpoints and reads the next
    step's features while training goes on; None: training waits for both.
    """
    start = recover(side.session, side.checkpoints, report)
    ranks = Ranks(Worker(side.learner, side.features, executor), side.link)
    ranks.begin(epoch=side.session.epoch, **side.about)
    before = record_ranks(side.session, start.step, ranks.size, sharded=ranks.are_sharded)
    if ranks.size > 1 or before > 1:
        report("ranks", ranks=ranks.size, before=before, step=start.step, sharded=ranks.are_sharded)
    if start.checkpoint is not None and start.head is not None:
        ranks.load(start.checkpoint.files, start.head)
        report("resumed", step=start.step)
    coordinator = Coordinator(
        side.session,
        side.features,
        side.checkpoints,
        ranks,
        start,
        settings,
        executor=executor,
        report=report,
    )
    coordinator.clean_up()
    loader = StepLoader(
        side.session,
        loading,
        position=start.position,
        should_stop=lambda: should_stop() or ranks.asked_to_stop,
        on_wait=coordinator.before_wait,
        report=report,
        clock=clock,
    )
    return Trainer(coordinator, ranks, settings, report=report), loader
