"""The metadata store in plain dictionaries: the readable specification, and the private store.

One lock, no durability: it serves threads of one process and dies with it. Every other store
must behave like this one; the conformance suite and the differential state machine say so.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from paceline.ledger.records import (
    BegunStep,
    CheckpointRecord,
    CommittedRef,
    Fence,
    Intent,
    LedgerUsage,
    SampleRecord,
    StepPlan,
    TaskLease,
    TrainedSample,
    TrainedStep,
    chain_of,
    compacted,
)
from paceline.ledger.refusals import (
    behind_head,
    contradicts,
    fenced,
    head_is_kept,
    history_is_folded,
    intent_revoked,
    not_covered,
    out_of_turn,
)
from paceline.ledger.store import MetadataStore
from paceline.types import SampleRef, ref_to_json

OPS_KEPT = 4096


@dataclass
class _Sample:
    seq: int
    ref: SampleRef
    state: str = "present"  # present | lost | released | quarantined
    resident: bool = True  # the feature store should hold its bytes
    reason: str = ""
    quarantine_step: int | None = None


@dataclass
class _Ack:
    step: int | None
    durable: bool


@dataclass
class _Task:
    ordinal: int
    state: str = "pending"  # pending | leased | done | failed
    holder: str = ""
    attempt: int = 0
    deaths: int = 0
    reason: str = ""


class _Operation:
    """One call with an op id: what its first try returned, if there was one."""

    def __init__(self, results: dict[str, Any], op_id: str | None) -> None:
        self._results = results
        self._op_id = op_id
        self.repeated = op_id is not None and op_id in results

    @property
    def result(self) -> Any:
        return self._results[self._op_id or ""]

    def keep(self, result: Any) -> Any:
        if self._op_id is not None:
            self._results[self._op_id] = result
            if len(self._results) > OPS_KEPT:
                del self._results[next(iter(self._results))]
        return result


class InMemoryMetadataStore(MetadataStore):
    durable = False

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._lsn = 0
        self._next_generation = 1
        self._samples: dict[str, _Sample] = {}
        self._acks: dict[str, _Ack] = {}
        self._tasks: dict[str, _Task] = {}
        self._roles: dict[str, int] = {}
        self._intents: dict[int, Intent] = {}
        self._plans: dict[int, StepPlan] = {}
        self._deaths: dict[int, int] = {}
        self._started_step: int | None = None
        self._trained_step = 0
        self._folded_step = 0
        self._checkpoints: dict[int, CheckpointRecord] = {}
        self._facts: dict[str, str] = {}
        self._ops: dict[str, Any] = {}

    @contextmanager
    def _mutation(self, fence: Fence | None, op_id: str | None = None) -> Iterator[_Operation]:
        with self._changed:
            operation = _Operation(self._ops, op_id)
            if operation.repeated:
                yield operation
                return
            if fence is not None and self._roles.get(fence.role) != fence.epoch:
                raise fenced(fence, self._roles.get(fence.role, 0))
            yield operation
            self._lsn += 1
            self._changed.notify_all()

    # -- byte intents ----------------------------------------------------------------------

    def reserve(
        self, sizes: Mapping[str, int], *, fence: Fence | None = None, op_id: str | None = None
    ) -> dict[str, int]:
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                return dict(operation.result)
            generations = {}
            for sample_id, num_bytes in sizes.items():
                generations[sample_id] = self._next_generation
                self._intents[self._next_generation] = Intent(self._next_generation, sample_id, num_bytes)
                self._next_generation += 1
            return dict(operation.keep(generations))

    def revoke(self, generations: Sequence[int], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            for generation in generations:
                self._intents.pop(generation, None)

    def intents(self) -> list[Intent]:
        with self._changed:
            return list(self._intents.values())

    # -- samples ---------------------------------------------------------------------------

    def commit_samples(
        self, refs: Sequence[SampleRef], *, fence: Fence | None = None, op_id: str | None = None
    ) -> list[bool]:
        for ref in refs:
            ref_to_json(ref)  # refuses tensors and whatever a durable store could not carry
        if not refs:
            return []
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                return list(operation.result)
            gone = [ref.sample_id for ref in refs if not self._may_commit(ref)]
            if gone:
                raise intent_revoked(gone)
            return list(operation.keep([self._commit(ref) for ref in refs]))

    def _may_commit(self, ref: SampleRef) -> bool:
        intent = self._intents.get(ref.generation)
        if ref.generation == 0 or (intent is not None and intent.sample_id == ref.sample_id):
            return True
        known = self._samples.get(ref.sample_id)
        return known is not None and known.ref.generation == ref.generation  # committed before

    def _commit(self, ref: SampleRef) -> bool:
        self._intents.pop(ref.generation, None)
        known = self._samples.get(ref.sample_id)
        if known is not None and (known.state != "lost" or known.ref.generation == ref.generation != 0):
            return False
        if known is None:
            self._samples[ref.sample_id] = _Sample(seq=len(self._samples) + 1, ref=ref)
        else:
            known.ref, known.state, known.resident = ref, "present", True
        task = self._tasks.get(ref.source_task_id or "")
        if task is not None:
            task.state, task.holder, task.attempt, task.deaths = "done", "", 0, 0
        return True

    def is_committed(self, sample_id: str) -> bool:
        with self._changed:
            return sample_id in self._samples

    def get_committed(self, sample_id: str) -> SampleRef | None:
        with self._changed:
            sample = self._samples.get(sample_id)
            return sample.ref if sample else None

    def sample_record(self, sample_id: str) -> SampleRecord | None:
        with self._changed:
            sample, ack = self._samples.get(sample_id), self._acks.get(sample_id)
            if sample is None:
                return None
            return SampleRecord(
                sample_id,
                sample.seq,
                sample.state,
                sample.ref.source_task_id,
                ack.step if ack else sample.quarantine_step,
                ack.durable if ack else False,
                sample.reason,
            )

    def committed_count(self) -> int:
        with self._changed:
            return len(self._samples)

    def all_committed_ids(self) -> list[str]:
        with self._changed:
            return [i for i, _ in self._in_order()]

    def _in_order(self) -> list[tuple[str, _Sample]]:
        return sorted(self._samples.items(), key=lambda item: item[1].seq)

    def read_committed(self, after_seq: int, limit: int) -> list[CommittedRef]:
        with self._changed:
            samples = [s for _, s in self._in_order()[after_seq : after_seq + limit]]
            return [CommittedRef(s.seq, s.ref, s.state != "lost", s.state == "quarantined") for s in samples]

    # -- acks ------------------------------------------------------------------------------

    def record_train_ack(
        self,
        sample_ids: Sequence[str],
        *,
        global_step: int | None,
        optimizer_durable: bool,
        fence: Fence | None = None,
    ) -> None:
        if not all(isinstance(sample_id, str) for sample_id in sample_ids):
            raise TypeError("sample ids are strings")
        with self._mutation(fence):
            self._ack(sample_ids, global_step, durable=optimizer_durable)

    def _ack(self, sample_ids: Sequence[str], step: int | None, *, durable: bool) -> None:
        for sample_id in sample_ids:
            known = self._acks.get(sample_id)
            if known is None or not known.durable:
                self._acks[sample_id] = _Ack(step, durable)

    def ack_step(
        self,
        step: int,
        rev: int,
        finished: Sequence[str],
        *,
        fence: Fence | None = None,
        op_id: str | None = None,
    ) -> None:
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                return
            plan = self._plans.get(step)
            if step != self._trained_step + 1 or plan is None or plan.rev != rev:
                raise out_of_turn(step, rev, self._trained_step, plan)
            self._ack(finished, step, durable=False)
            self._trained_step, self._started_step = step, None
            self._deaths.pop(step, None)
            operation.keep(None)

    def durable_marker(self) -> dict[str, Any]:
        with self._changed:
            durable = any(ack.durable for ack in self._acks.values())
            chosen = {i: ack for i, ack in self._acks.items() if ack.durable == durable}
            steps = [ack.step for ack in chosen.values() if ack.step is not None]
            return {
                "acked": set(chosen),
                "global_step": max(steps, default=None),
                "optimizer_durable": durable,
            }

    # -- roles -----------------------------------------------------------------------------

    def acquire_role(self, role: str, holder: str) -> Fence:  # noqa: ARG002 (for the record)
        with self._mutation(None):
            self._roles[role] = self._roles.get(role, 0) + 1
            if role == "producer":
                self._intents.clear()
                for task in self._tasks.values():
                    if task.state == "leased":
                        task.state, task.holder, task.deaths = "pending", "", task.deaths + 1
            if role == "consumer":
                self._acks = {i: ack for i, ack in self._acks.items() if ack.durable}
                self._trained_step = max(self._checkpoints, default=0)
                if self._started_step is not None:
                    self._deaths[self._started_step] = self._deaths.get(self._started_step, 0) + 1
                    self._started_step = None
            return Fence(role, self._roles[role])

    def role_epochs(self) -> dict[str, int]:
        with self._changed:
            return dict(self._roles)

    # -- prompt tasks ----------------------------------------------------------------------

    def add_tasks(self, task_ids: Sequence[str], *, fence: Fence | None = None) -> int:
        with self._mutation(fence):
            before = len(self._tasks)
            for task_id in task_ids:
                self._tasks.setdefault(task_id, _Task(ordinal=len(self._tasks)))
            return len(self._tasks) - before

    def lease_tasks(
        self,
        worker_id: str,
        limit: int,
        *,
        group_size: int | None = None,
        fence: Fence | None = None,
        op_id: str | None = None,
    ) -> list[TaskLease]:
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                return list(operation.result)
            pending = [(i, task) for i, task in self._tasks.items() if task.state == "pending"][:limit]
            if group_size is not None and pending:
                group = pending[0][1].ordinal // group_size
                pending = [(i, task) for i, task in pending if task.ordinal // group_size == group]
            for _, task in pending:
                task.state, task.holder = "leased", worker_id
            leases = [TaskLease(i, task.ordinal, task.attempt, task.deaths) for i, task in pending]
            return list(operation.keep(leases))

    def fail_tasks(
        self,
        worker_id: str,
        task_ids: Sequence[str],
        *,
        reason: str,
        attempt_max: int | None,
        fence: Fence | None = None,
    ) -> list[str]:
        buried = []
        with self._mutation(fence):
            for task_id in task_ids:
                task = self._tasks.get(task_id)
                if task is None or task.state != "leased" or task.holder != worker_id:
                    continue
                task.attempt += 1
                task.holder, task.reason = "", reason
                final = attempt_max is None or task.attempt >= attempt_max
                task.state = "failed" if final else "pending"
                if final:
                    buried.append(task_id)
                    self._give_up_lost(task_id, reason)
        return buried

    def _give_up_lost(self, task_id: str, reason: str) -> None:
        """A lost sample whose prompt cannot be captured any more will never come back."""
        for sample in self._samples.values():
            if sample.ref.source_task_id == task_id and sample.state == "lost":
                sample.state, sample.reason = "quarantined", reason

    def return_tasks(self, worker_id: str, task_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            for task_id in task_ids:
                task = self._tasks.get(task_id)
                if task is not None and task.state == "leased" and task.holder == worker_id:
                    task.state, task.holder = "pending", ""

    def task_counts(self) -> dict[str, int]:
        counts = dict.fromkeys(("pending", "leased", "done", "failed"), 0)
        with self._changed:
            for task in self._tasks.values():
                counts[task.state] += 1
        return counts

    def failed_tasks(self) -> dict[str, str]:
        with self._changed:
            return {i: task.reason for i, task in self._tasks.items() if task.state == "failed"}

    # -- step plans ------------------------------------------------------------------------

    def begin_step(
        self, plan: StepPlan, *, fence: Fence | None = None, op_id: str | None = None
    ) -> BegunStep:
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                begun: BegunStep = operation.result
                return begun
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
                self._plans.setdefault(trained.step, trained.plan)
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
        for trained in lineage:
            on_record = self._plans.get(trained.step)
            if on_record is not None and on_record.digest != trained.plan.digest:
                raise contradicts(checkpoint, f"step {trained.step} was planned otherwise")
            for sample in trained.samples:
                known = self._samples.get(sample.sample_id)
                if seqs.setdefault(sample.seq, sample.sample_id) != sample.sample_id or (
                    known is not None and known.seq != sample.seq
                ):
                    raise contradicts(checkpoint, f"{sample.sample_id} has another place in the log")
                if on_record is None and known is not None and known.state == "quarantined":
                    raise contradicts(checkpoint, f"{sample.sample_id} is quarantined")
        if sorted(seqs) != list(range(1, len(seqs) + 1)):
            raise contradicts(checkpoint, "samples before those it trained are unknown here")

    def _enter(self, sample: TrainedSample) -> None:
        """A sample of a lineage that this ledger forgot: lost until its last visit says otherwise."""
        if sample.sample_id not in self._samples:
            ref = SampleRef(sample.sample_id, "", sample.task_id, "", {}, {}, "")
            self._samples[sample.sample_id] = _Sample(sample.seq, ref, "lost", resident=False)

    def _finish_task(self, task_id: str | None) -> None:
        task = self._tasks.get(task_id or "")
        if task is not None and task.state != "failed":
            task.state, task.holder = "done", ""

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

    def quarantined(self) -> dict[str, str]:
        with self._changed:
            return {i: s.reason for i, s in self._in_order() if s.state == "quarantined"}

    # -- features --------------------------------------------------------------------------

    def releasable(self, limit: int) -> list[str]:
        with self._changed:
            return [i for i, s in self._in_order() if s.resident and self._is_covered(i)][:limit]

    def _is_covered(self, sample_id: str) -> bool:
        sample = self._samples[sample_id]
        if sample.state == "quarantined":
            head = max(self._checkpoints, default=-1)
            return sample.quarantine_step is None or sample.quarantine_step <= head
        return self._is_durable(sample_id)

    def _is_durable(self, sample_id: str) -> bool:
        ack = self._acks.get(sample_id)
        return ack is not None and ack.durable

    def begin_release(self, limit: int, *, fence: Fence | None = None) -> list[SampleRef]:
        with self._mutation(fence):
            return [self._samples[i].ref for i in self.releasable(limit)]

    def record_released(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            early = [i for i in sample_ids if i not in self._samples or not self._is_covered(i)]
            if early:
                raise not_covered(early)
            for sample_id in sample_ids:
                sample = self._samples[sample_id]
                sample.resident = False
                if sample.state == "present":
                    sample.state = "released"

    def report_lost(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            self._lose([i for i in sample_ids if i in self._samples and not self._is_durable(i)])

    def _lose(self, sample_ids: Sequence[str]) -> None:
        for sample_id in sample_ids:
            sample = self._samples[sample_id]
            sample.resident = False
            if sample.state == "quarantined":
                continue
            sample.state = "lost"
            task = self._tasks.get(sample.ref.source_task_id or "")
            if task is not None and task.state == "done":
                task.state, task.holder = "pending", ""

    def present_ids(self) -> list[str]:
        return list(self.present_generations())

    def present_generations(self) -> dict[str, int]:
        with self._changed:
            return {i: s.ref.generation for i, s in self._in_order() if s.resident}

    def lost_ids(self) -> list[str]:
        with self._changed:
            return [i for i, s in self._in_order() if s.state == "lost"]

    def usage(self) -> LedgerUsage:
        with self._changed:
            resident = {i: s.ref.estimated_bytes for i, s in self._samples.items() if s.resident}
            provisional = [
                size for i, size in resident.items() if i in self._acks and not self._is_durable(i)
            ]
            untrained = [i for i, s in self._samples.items() if s.state in ("present", "lost")]
            return LedgerUsage(
                len(resident),
                sum(resident.values()),
                len(provisional),
                sum(provisional),
                len([i for i in untrained if i not in self._acks]),
                len(self._intents),
                sum(intent.num_bytes for intent in self._intents.values()),
            )

    def compact(self, *, fence: Fence | None = None) -> int:
        with self._mutation(fence):
            self._folded_step = max(self._folded_step, min(self._checkpoints, default=0))
            folded = 0
            for sample_id, sample in self._samples.items():
                ack, small = self._acks.get(sample_id), compacted(sample.ref)
                old = ack is not None and ack.step is not None and ack.step <= self._folded_step
                if sample.state == "released" and old and sample.ref != small:
                    sample.ref = replace(small, generation=sample.ref.generation)
                    folded += 1
            return folded

    # -- run -------------------------------------------------------------------------------

    def set_facts(self, facts: Mapping[str, Any], *, fence: Fence | None = None) -> None:
        encoded = {key: json.dumps(value) for key, value in facts.items()}
        with self._mutation(fence):
            self._facts.update(encoded)

    def facts(self) -> dict[str, Any]:
        with self._changed:
            return {key: json.loads(value) for key, value in self._facts.items()}

    def lsn(self) -> int:
        with self._changed:
            return self._lsn

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._lsn != seen_lsn, timeout_s)
            return self._lsn

    def close(self) -> None:
        """Nothing to give back; the contents stay readable until the object dies."""
