"""ConsumerSession: every ledger call of the consumer, under its epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from paceline.ledger.ledger import Ledger
from paceline.ledger.records import (
    CONSUMER,
    BegunStep,
    CheckpointRecord,
    StepAck,
    StepPlan,
    TrainedStep,
)
from paceline.ledger.session import Session

RELEASE_AT_ONCE = 1000


class Frees(Protocol):
    """The part of a feature store that a release needs."""

    def free(self, written: Iterable[tuple[str, int]]) -> None: ...


class ConsumerSession(Session):
    def __init__(self, ledger: Ledger, run_id: str) -> None:
        super().__init__(ledger, run_id, CONSUMER)
        self._unwritten_ack: StepAck | None = None
        self.note: Callable[[str], None] = lambda _: None  # gets positions that are known to be durable

    def acquire(self) -> int:
        self._unwritten_ack = None
        return super().acquire()

    # -- steps -----------------------------------------------------------------------------

    def step_plan(self, step: int) -> StepPlan | None:
        return self.ledger.step_plan(step)

    def plan(self, plan: StepPlan) -> BegunStep:
        """Record what the step will train, before it does; the plan on record wins.

        The ack of the step before is written in the same transaction: one transaction a step.
        """
        begun = self._change(self.ledger.plan, plan, self._unwritten_ack)
        self._unwritten_ack = None
        assert begun is not None, "a plan was given"
        return begun

    def leave(self) -> None:
        """Leave the step that was begun untrained for now; it will be trained with the same plan."""
        self._change(self.ledger.plan, None)

    def ack(self, step: int, rev: int, finished: Sequence[str]) -> None:
        """The weights in memory contain the step; `finished` had their last visit in it.

        The ack is written with the plan of the next step, or by `write_ack`. It is provisional: a crash
        that loses the ack also loses the weights.
        """
        self.write_ack()
        self._unwritten_ack = StepAck(step, rev, tuple(finished))

    def write_ack(self) -> None:
        """Write the pending ack when no next plan will carry it: before a wait, a checkpoint, the end."""
        if self._unwritten_ack is not None:
            self._change(self.ledger.plan, None, self._unwritten_ack)
            self._unwritten_ack = None

    def quarantine(self, sample_ids: Sequence[str], *, step: int | None, reason: str) -> None:
        """Never train these samples (again), and say why for good."""
        self._change(self.ledger.quarantine, list(sample_ids), step=step, reason=reason)

    # -- checkpoints -----------------------------------------------------------------------

    def checkpoints(self) -> tuple[CheckpointRecord, ...]:
        """The retained checkpoints, oldest first; the last one is the head."""
        return self.ledger.snapshot().checkpoints

    def head(self, checkpoint: CheckpointRecord) -> None:
        """THE commit point. Call only once the checkpoint's folder is durable."""
        before = self.ledger.position()
        self._change(self.ledger.head, checkpoint)
        self.note(before)

    def adopt(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep]) -> None:
        """Roll the ledger forward to a durable checkpoint that it does not know."""
        self._change(self.ledger.head, checkpoint, lineage)

    def fall_back(self, step: int) -> list[str]:
        """Return to the checkpoint at `step`; returns the samples that must be captured again."""
        return self._change(self.ledger.fall_back, step)

    def retire(self, keep: int) -> None:
        """Keep the records of the newest `keep` checkpoints, and archive what no recovery can need."""
        self._change(self.ledger.retire, keep)

    # -- features --------------------------------------------------------------------------

    def release(self, features: Frees) -> int:
        """Free the features of every sample that no step will need again; returns how many.

        First a fenced call, so that a replaced consumer frees nothing. Then the bytes, by generation, so
        that a slow consumer cannot free bytes captured since. The record comes last: after a crash before
        it the frees are repeated, and they are idempotent.
        """
        num_freed, freed = 0, list[str]()
        while covered := self._change(self.ledger.release, freed, RELEASE_AT_ONCE):
            features.free(list(covered.items()))
            freed = list(covered)
            num_freed += len(freed)
        return num_freed
