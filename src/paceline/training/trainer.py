"""The consumer's loop: plan, fetch, step, ack; and now and then the checkpoint that commits it all.

An ack is provisional: it says that the weights in memory contain the step. The checkpoint is
the commit: once its folder is durable and the ledger names it head, and not before, the features
it covers are freed. A trainer that dies goes back to the newest valid checkpoint and replays the
recorded plans from there, so the weights come out bit for bit as if it had never died.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import nn

from paceline.crashpoints import reach
from paceline.errors import CheckpointError
from paceline.features.store import FeatureStore
from paceline.ledger.controller import DataFlowController
from paceline.loader.loader import PlannedStep, StepLoader
from paceline.loader.passes import Position
from paceline.methods.method import DraftMethod
from paceline.methods.target_head import TargetHead
from paceline.training.checkpoint import Checkpoint, CheckpointFolder
from paceline.training.optimizer import (
    OptimizerSettings,
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from paceline.training.step import StepResult, train_step

CHECKPOINT_WANTED = "checkpoint_wanted"


@dataclass(frozen=True)
class TrainerSettings:
    """What decides the weights (seed, sizes, optimizer) and how often they are made durable.

    `first_samples`: how many of the run's first samples choose the draft vocabulary and warm-start.
    """

    optimizer: OptimizerSettings
    seed: int = 0
    micro_batch_size: int = 8
    first_samples: int = 64
    autocast_dtype: torch.dtype | None = None
    max_steps: int | None = None
    checkpoint_interval_steps: int = 25
    checkpoints_kept: int = 2


class Trainer:
    def __init__(
        self,
        controller: DataFlowController,
        features: FeatureStore,
        method: DraftMethod,
        head: TargetHead,
        checkpoints: CheckpointFolder,
        settings: TrainerSettings,
        *,
        report: Callable[..., None] = lambda *_, **__: None,
        trainer_id: str = "trainer-0",
    ) -> None:
        """Takes the consumer role: an older consumer of the run is fenced from here on."""
        self.controller = controller
        self.step = 0
        self.last_seq = 0
        self.position = Position()
        self.draft: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._features = features
        self._method = method
        self._head = head
        self._checkpoints = checkpoints
        self._settings = settings
        self._report = report
        self._trainer_id = trainer_id
        self._head_step: int | None = None
        self._fence = controller.take_role("consumer")
        self._restore()

    # -- start -----------------------------------------------------------------------------

    def _restore(self) -> None:
        """Load the newest valid checkpoint. Raises CheckpointError if there are some but none is valid."""
        store = self.controller.store
        records = store.checkpoints()
        for record in reversed(records):
            try:
                checkpoint = self._checkpoints.read(record)
            except CheckpointError as error:
                self._report("checkpoint_damaged", step=record.step, message=str(error))
                continue
            if record != records[-1]:
                lost = store.fall_back(record.step, fence=self._fence)
                self._report("fall_back", step=record.step, lost_samples=len(lost))
            self._load(checkpoint)
            break
        else:
            if records:
                raise CheckpointError(
                    f"None of the {len(records)} checkpoints in {self._checkpoints.folder} is valid.",
                    why="Starting over would train every sample a second time under the same run.",
                    next="restore the folder from a backup, or start a new run.",
                )
        self._checkpoints.sweep(keep={record.name for record in store.checkpoints()})
        self.controller.release(self._features)

    def _load(self, checkpoint: Checkpoint) -> None:
        draft = self._method.build_draft(self._head, self._settings.seed)
        draft.load_state_dict(dict(checkpoint.tensors["draft"]))
        self._method.attach_target(draft, self._head)
        self._adopt(draft)
        assert self.optimizer is not None
        restore_optimizer(draft, self.optimizer, checkpoint.tensors["optimizer"])
        torch.set_rng_state(checkpoint.tensors["rng"]["torch"])
        self.step, self.last_seq = checkpoint.step, checkpoint.last_seq
        self.position = Position(*checkpoint.values["position"])
        self._head_step = checkpoint.step
        self._report("resumed", step=self.step)

    def _adopt(self, draft: nn.Module) -> None:
        self.draft = draft
        scales = self._method.learning_rate_scales()
        self.optimizer = build_optimizer(draft, self._settings.optimizer, scales)

    def _initialise(self, loader: StepLoader) -> bool:
        """Build the draft from the run's first samples and make it checkpoint 0; False if stopped."""
        samples = loader.first_samples(self._settings.first_samples)
        if not samples:
            return False
        weights = self._method.token_weights(self._head, samples)
        seed = self._settings.seed
        torch.manual_seed(seed)
        draft = self._method.build_draft(self._head, seed, weights)
        self._method.warm_start(draft, self._head, samples, seed)
        self._adopt(draft)
        self.checkpoint()
        return True

    # -- the loop --------------------------------------------------------------------------

    def fit(self, loader: StepLoader) -> int:
        """Train until the stream ends, `max_steps`, or a stop; the last step. Ends with a checkpoint."""
        loader.on_wait = self._relieve_pressure
        if self.draft is None and not self._initialise(loader):
            return self.step
        while self._settings.max_steps is None or self.step < self._settings.max_steps:
            planned = loader.next_step(self.step + 1)
            if planned is None:
                break
            self._train(planned)
            loader.ack(planned)
            if self.step % self._settings.checkpoint_interval_steps == 0:
                self.checkpoint()
            else:
                self._relieve_pressure()
        if self.step != self._head_step:
            self.checkpoint()
        return self.step

    def _train(self, planned: PlannedStep) -> None:
        assert self.draft is not None
        assert self.optimizer is not None
        started = monotonic()
        reach("trainer.before_step")
        result = train_step(
            planned.step,
            planned.samples,
            self.draft,
            self._method,
            self.optimizer,
            self._settings.optimizer,
            micro_batch_size=self._settings.micro_batch_size,
            autocast_dtype=self._settings.autocast_dtype,
        )
        reach("trainer.before_ack")
        # A sample is acked by its last visit: until then its features are needed again.
        self.controller.ack_train_refs(
            self._trainer_id,
            [ref.sample_id for ref in planned.finished],
            global_step=planned.step,
            optimizer_durable=False,
        )
        reach("trainer.after_ack")
        self.step, self.last_seq, self.position = planned.step, planned.last_seq, planned.after
        self._report("step", **_step_fields(planned, result, monotonic() - started))

    # -- the commit point ------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Make everything up to this step durable, then free what it covers."""
        assert self.draft is not None
        assert self.optimizer is not None
        started = monotonic()
        record = self._checkpoints.write(
            Checkpoint(
                step=self.step,
                last_seq=self.last_seq,
                tensors={
                    "draft": self.draft.state_dict(),
                    "optimizer": optimizer_tensors(self.draft, self.optimizer),
                    "rng": {"torch": torch.get_rng_state()},
                },
                values={
                    "method": self._method.name,
                    "draft_config": self._method.describe(self.draft),
                    "position": [self.position.stage, self.position.offset],
                },
            )
        )
        store = self.controller.store
        store.record_checkpoint(record, fence=self._fence)
        self._head_step = self.step
        reach("checkpoint.after_head")
        released = self.controller.release(self._features)
        reach("checkpoint.after_release")
        self._retire_old()
        store.set_facts({CHECKPOINT_WANTED: False}, fence=self._fence)
        self._report("checkpoint", step=self.step, released=released, seconds=monotonic() - started)

    def _retire_old(self) -> None:
        store = self.controller.store
        for record in store.checkpoints()[: -self._settings.checkpoints_kept]:
            store.forget_checkpoint(record.step, fence=self._fence)
        store.compact()
        self._checkpoints.sweep(keep={record.name for record in store.checkpoints()})

    def _relieve_pressure(self) -> None:
        """Checkpoint early if the producer waits for bytes that only a checkpoint can free."""
        if self.step == self._head_step or self.draft is None:
            return
        if self.controller.store.facts().get(CHECKPOINT_WANTED):
            self.checkpoint()


def _step_fields(planned: PlannedStep, result: StepResult, seconds: float) -> dict[str, Any]:
    return {
        "step": planned.step,
        "samples": len(planned.refs),
        "loss": result.loss,
        "num_tokens": result.num_tokens,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "wait_seconds": planned.wait_s,
        "step_seconds": seconds,
        **result.metrics,
    }
