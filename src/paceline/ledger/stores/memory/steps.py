"""Step plans, checkpoints and quarantine: what decides which weights survive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paceline.ledger.records import (
    BegunStep,
    CheckpointRecord,
    Fence,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
    chain_of,
)
from paceline.ledger.refusals import (
    behind_head,
    contradicts,
    head_is_kept,
    history_is_folded,
    out_of_turn,
)
from paceline.ledger.stores.memory.rows import SampleRow
from paceline.ledger.stores.memory.samples import Samples
from paceline.types import SampleRef


class Steps(Samples):
    # -- step plans ------------------------------------------------------------------------

    def begin_step(
        self,
        plan: StepPlan,
        *,
        ack: StepAck | None = None,
        fence: Fence | None = None,
        op_id: str | None = None,
    ) -> BegunStep:
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                begun: BegunStep = operation.result
                return begun
            if plan.step <= self._folded_step:
                raise history_is_folded(plan.step, self._folded_step)
            if ack is not None:
                self._take_ack(ack)
            stored = self._plans.setdefault(plan.step, plan)
            if plan.rev > stored.rev and plan.step > self._trained_step:
                stored = self._plans[plan.step] = plan
                self._deaths.pop(plan.step, None)
            self._started_step = plan.step
            begun = BegunStep(stored, self._deaths.get(plan.step, 0))
            operation.keep(begun)
            return begun

    def leave_step(self, step: int, *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            if self._started_step == step:
                self._started_step = None

    def get_plan(self, step: int) -> StepPlan | None:
        with self._changed:
            return self._plans.get(step)

    def plans(self) -> Iterator[StepPlan]:
        with self._changed:
            return iter([self._plans[step] for step in sorted(self._plans)])

    def trained_step(self) -> int:
        with self._changed:
            return self._trained_step

    def ack_step(self, ack: StepAck, *, fence: Fence | None = None, op_id: str | None = None) -> None:
        with self._mutation(fence, op_id) as operation:
            if not operation.repeated:
                self._take_ack(ack)
                operation.keep(None)

    def _take_ack(self, ack: StepAck) -> None:
        plan = self._plans.get(ack.step)
        if ack.step != self._trained_step + 1 or plan is None or plan.rev != ack.rev:
            raise out_of_turn(ack, self._trained_step, plan)
        self._ack(ack.finished, ack.step, durable=False)
        self._trained_step, self._started_step = ack.step, None
        self._deaths.pop(ack.step, None)

    # -- checkpoints -----------------------------------------------------------------------

    def record_checkpoint(self, checkpoint: CheckpointRecord, *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            head = self._head()
            if head == checkpoint:
                return
            if head is not None and checkpoint.step <= head.step:
                raise behind_head(checkpoint.step, head.step)
            if checkpoint.chain:
                first = head.step + 1 if head else 1
                plans = [self._plans.get(step) for step in range(first, checkpoint.step + 1)]
                known = [plan for plan in plans if plan is not None]
                before = head.chain if head else ""
                if len(known) < len(plans) or chain_of(before, known) != checkpoint.chain:
                    raise contradicts(checkpoint, "its lineage is not that of the plans on record")
            self._become_head(checkpoint)

    def _head(self) -> CheckpointRecord | None:
        return self._checkpoints[max(self._checkpoints)] if self._checkpoints else None

    def _become_head(self, checkpoint: CheckpointRecord) -> None:
        self._checkpoints[checkpoint.step] = checkpoint
        self._trained_step = max(self._trained_step, checkpoint.step)
        for ack in self._acks.values():
            if ack.step is not None and ack.step <= checkpoint.step:
                ack.durable = True

    def adopt_checkpoint(
        self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep], *, fence: Fence | None = None
    ) -> None:
        with self._mutation(fence):
            self._check_lineage(checkpoint, lineage)
            for trained in lineage:
                self._plans[trained.step] = trained.plan
                for sample in trained.samples:
                    self._enter(sample)
                    if sample.finished:
                        self._ack([sample.sample_id], trained.step, durable=True)
                        known = self._samples[sample.sample_id]
                        if known.state == "lost":
                            known.state = "released"
                            self._finish_task(sample.task_id)
            self._become_head(checkpoint)
            self._trained_step = checkpoint.step

    def _check_lineage(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep]) -> None:
        head = self._head()
        first = max(0, head.step if head else 0) + 1
        if head is not None and checkpoint.step <= head.step:
            raise behind_head(checkpoint.step, head.step)
        if [trained.step for trained in lineage] != list(range(first, checkpoint.step + 1)):
            raise contradicts(checkpoint, f"its steps do not follow the head at step {first - 1}")
        if chain_of(head.chain if head else "", [trained.plan for trained in lineage]) != checkpoint.chain:
            raise contradicts(checkpoint, "its chain does not continue that of the head")
        seqs = {sample.seq: i for i, sample in self._samples.items()}
        done = {i for i in self._acks if self._is_durable(i)}
        for trained in lineage:
            on_record = self._plans.get(trained.step)
            if on_record is not None and trained.rev > on_record.rev:
                on_record = None  # a revision that the ledger has forgotten
            if on_record is not None and on_record.digest != trained.plan.digest:
                raise contradicts(checkpoint, f"step {trained.step} was planned otherwise")
            for sample in trained.samples:
                known = self._samples.get(sample.sample_id)
                if seqs.setdefault(sample.seq, sample.sample_id) != sample.sample_id or (
                    known is not None and known.seq != sample.seq
                ):
                    raise contradicts(checkpoint, f"{sample.sample_id} has another place in the log")
                if sample.sample_id in done:
                    raise contradicts(checkpoint, f"{sample.sample_id} was trained for the last time before")
                if sample.finished:
                    done.add(sample.sample_id)
                if on_record is None and known is not None and known.state == "quarantined":
                    raise contradicts(checkpoint, f"{sample.sample_id} is quarantined")
        if sorted(seqs) != list(range(1, len(seqs) + 1)):
            raise contradicts(checkpoint, "samples before those it trained are unknown here")

    def _enter(self, sample: TrainedSample) -> None:
        """A sample of a lineage that this ledger forgot: lost until its last visit says otherwise."""
        if sample.sample_id not in self._samples:
            ref = SampleRef(sample.sample_id, "", sample.task_id, "", {}, {}, "")
            self._samples[sample.sample_id] = SampleRow(sample.seq, ref, "lost", resident=False)

    def checkpoints(self) -> list[CheckpointRecord]:
        with self._changed:
            return [self._checkpoints[step] for step in sorted(self._checkpoints)]

    def forget_checkpoint(self, step: int, *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            if step == max(self._checkpoints, default=None):
                raise head_is_kept(step)
            self._checkpoints.pop(step, None)

    def fall_back(self, step: int, *, fence: Fence | None = None) -> list[str]:
        with self._mutation(fence):
            if step < self._folded_step:
                raise history_is_folded(step, self._folded_step)
            self._checkpoints = {s: c for s, c in self._checkpoints.items() if s <= step}
            undone = {i for i, ack in self._acks.items() if ack.step is not None and ack.step > step}
            for sample_id in undone:
                del self._acks[sample_id]
            lost = [i for i, s in self._in_order() if i in undone and s.state == "released"]
            self._lose(lost)
            self._trained_step = min(self._trained_step, step)
            return lost

    # -- poison ----------------------------------------------------------------------------

    def quarantine(
        self, sample_ids: Sequence[str], *, step: int | None, reason: str, fence: Fence | None = None
    ) -> None:
        with self._mutation(fence):
            for sample_id in sample_ids:
                sample = self._samples.get(sample_id)
                if sample is None or sample.state not in ("present", "lost") or self._is_durable(sample_id):
                    continue
                self._acks.pop(sample_id, None)
                sample.state, sample.reason, sample.quarantine_step = "quarantined", reason, step
                task = self._tasks.get(sample.ref.source_task_id or "")
                if task is not None and task.state == "pending":
                    task.state, task.reason = "failed", reason

    def quarantined(self, among: Sequence[str] | None = None) -> dict[str, str]:
        with self._changed:
            found = {i: s.reason for i, s in self._in_order() if s.state == "quarantined"}
            return {i: reason for i, reason in found.items() if among is None or i in among}
