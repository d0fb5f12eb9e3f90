"""The consumer's loop: plan, fetch, step, ack; and now and then the checkpoint that commits it all.

An ack is provisional: it says that the weights in memory contain the step. The checkpoint is
the commit (commits.py): once its folder is durable and the ledger names it head, and not before, the
features it covers are freed. A trainer that dies goes back to the newest valid checkpoint and replays the
recorded plans from there, so the weights come out bit for bit as if it had never died. No torch
here: the weights are the learner's (learner.py).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from time import monotonic
from typing import Any

from paceline.features.store import FeatureStore
from paceline.ledger.controller import DataFlowController
from paceline.ledger.facts import BUILDS_BEGUN, CHECKPOINT_WANTED
from paceline.ledger.records import CheckpointRecord
from paceline.ledger.trial import DEATHS_BEFORE_TRIAL
from paceline.loader.loader import PlannedStep, StepLoader
from paceline.loader.passes import Position
from paceline.training.checkpoint import Checkpoint, CheckpointFolder
from paceline.training.commits import Commits, Inline
from paceline.training.learner import Learner
from paceline.training.poison import SAMPLE_FAILURES, failing_samples
from paceline.training.recovery import recover
from paceline.training.settings import TrainerSettings


class Trainer:
    def __init__(
        self,
        controller: DataFlowController,
        features: FeatureStore,
        learner: Learner,
        checkpoints: CheckpointFolder,
        settings: TrainerSettings,
        *,
        executor: Executor | None = None,
        report: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Takes the consumer role: an older consumer of the run is fenced from here on.

        `executor`: writes checkpoints while training goes on; None: training waits for them.
        """
        self.controller = controller
        self.learner = learner
        self.step = 0
        self.last_seq = 0
        self.position = Position()
        self._settings = settings
        self._report = report
        epoch_before = controller.store.role_epochs().get("consumer", 0)
        self._fence = controller.take_role("consumer")
        self._commits = Commits(
            controller,
            features,
            checkpoints,
            self._fence,
            executor or Inline(),
            kept=settings.checkpoints_kept,
            report=report,
        )
        found = recover(controller.store, checkpoints, self._fence, epoch_before, report)
        if found is not None:
            self._load(*found)
        self._commits.sweep()
        controller.release(features)

    @property
    def draft(self) -> Any:
        """The weights, once there are some; a torch module with the torch learner."""
        return getattr(self.learner, "draft", None)

    # -- start -----------------------------------------------------------------------------

    def _load(self, record: CheckpointRecord, checkpoint: Checkpoint) -> None:
        self.learner.load(checkpoint.files)
        self.step, self.last_seq = checkpoint.step, checkpoint.last_seq
        self.position = Position(*checkpoint.values["position"])
        self._commits.head = record
        self._report("resumed", step=self.step)

    def _initialise(self, loader: StepLoader) -> bool:
        """Build the draft from the run's first samples and make it checkpoint 0; False if stopped."""
        store = self.controller.store
        while True:
            refs, samples = loader.first_samples(self._settings.first_samples)
            if not samples:
                return False
            tensors = dict(zip([ref.sample_id for ref in refs], samples, strict=True))
            begun = store.facts().get(BUILDS_BEGUN, 0)
            if begun < DEATHS_BEFORE_TRIAL:
                store.set_facts({BUILDS_BEGUN: begun + 1}, fence=self._fence)
                try:
                    self.learner.build(samples)
                    break
                except SAMPLE_FAILURES:
                    failing = failing_samples(self.controller, self.learner.build, "build", tensors)
                    if not failing:
                        raise
            else:  # consumers died over it, or were killed
                failing = failing_samples(self.controller, self.learner.build, "build", tensors)
            self._quarantine(failing, step=0)
            store.set_facts({BUILDS_BEGUN: 0}, fence=self._fence)
        self.checkpoint()
        return True

    # -- the loop --------------------------------------------------------------------------

    def fit(self, loader: StepLoader) -> int:
        """Train until the stream ends, `max_steps`, or a stop; the last step. Ends with a checkpoint."""
        loader.on_wait = self._wait
        if not self.learner.ready and not self._initialise(loader):
            return self.step
        while self._settings.max_steps is None or self.step < self._settings.max_steps:
            planned = loader.next_step(self.step + 1)
            if planned is None:
                break
            loader.ack(self._train(planned, loader))
            if self.step % self._settings.checkpoint_interval_steps == 0:
                self._stage()
            self._relieve_pressure()
        self.checkpoint()
        return self.step

    def _train(self, planned: PlannedStep, loader: StepLoader) -> PlannedStep:
        """Train the step, without what turns out to be poison in it; the step as it was trained."""
        started = monotonic()
        if planned.deaths >= DEATHS_BEFORE_TRIAL:
            deadly = failing_samples(self.controller, self.learner.attempt, *_trial_of(planned))
            planned = self._without(planned, deadly, loader) if deadly else planned
        while True:
            try:
                # All poison: the step passes by without an update.
                figures = self.learner.step(planned.step, planned.samples) if planned.refs else {}
                break
            except SAMPLE_FAILURES as error:
                failing = failing_samples(self.controller, self.learner.attempt, *_trial_of(planned))
                if not failing:
                    raise
                self._report("step_failed", step=planned.step, message=str(error))
                planned = self._without(planned, failing, loader)
        # A sample is acked by its last visit: until then its features are needed again.
        finished = [ref.sample_id for ref in planned.finished]
        self.controller.ack_step(planned.step, planned.rev, finished)
        self.step, self.last_seq, self.position = planned.step, planned.last_seq, planned.after
        self._commits.add(planned.trained)
        seconds = monotonic() - started
        fields = {"samples": len(planned.refs), "wait_seconds": planned.wait_s, "step_seconds": seconds}
        self._report("step", step=planned.step, **figures, **fields)
        return planned

    def _without(self, planned: PlannedStep, poison: dict[str, str], loader: StepLoader) -> PlannedStep:
        self._quarantine(poison, step=planned.step)
        return loader.revise(planned, set(poison))

    def _quarantine(self, poison: dict[str, str], *, step: int) -> None:
        for sample_id, reason in poison.items():
            self.controller.quarantine([sample_id], step=step, reason=reason)
            self._report("quarantined", step=step, sample_id=sample_id, message=reason)

    # -- the commit point ------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Make everything up to this step durable, then free what it covers."""
        self._stage()
        self._commits.settle()

    def _stage(self) -> None:
        if self.step == self._commits.step:
            return
        position = [self.position.stage, self.position.offset]
        values = {**self.learner.describe(), "position": position}
        self._commits.stage(self.step, self.last_seq, self.learner.files, values)

    def _wait(self) -> None:
        """Samples are waited for, and whoever looks meanwhile is to see the ack of the last step."""
        self.controller.write_ack()
        self._relieve_pressure()

    def _relieve_pressure(self) -> None:
        """Commit early if the producer waits for bytes that only a checkpoint can free."""
        self._commits.poll()
        uncommitted = self._commits.is_writing or self.step != self._commits.step
        if uncommitted and self.controller.store.facts().get(CHECKPOINT_WANTED):
            if not self._commits.is_writing:
                self._stage()
            self._commits.settle()


def _trial_of(planned: PlannedStep) -> tuple[str, dict[str, Any]]:
    """The name of a trial of this step, and its samples by id."""
    ids = [ref.sample_id for ref in planned.refs]
    return f"train.{planned.step}.{planned.rev}", dict(zip(ids, planned.samples, strict=True))
