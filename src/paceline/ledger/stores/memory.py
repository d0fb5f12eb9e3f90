"""The metadata store in plain dictionaries: the readable specification, and the private store.

One lock, no durability: it serves threads of one process and dies with it. Every other store
must behave like this one; the conformance suite says so.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from paceline.ledger.refusals import behind_head, fenced, head_is_kept, not_covered
from paceline.ledger.store import (
    CheckpointRecord,
    CommittedRef,
    Fence,
    LedgerUsage,
    MetadataStore,
    StepPlan,
    TaskLease,
    compacted,
)
from paceline.types import SampleRef, ref_to_json


@dataclass
class _Sample:
    seq: int
    ref: SampleRef
    state: str = "present"  # present | lost | released
    compacted: bool = False


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
    reason: str = ""


class InMemoryMetadataStore(MetadataStore):
    durable = False

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._lsn = 0
        self._samples: dict[str, _Sample] = {}
        self._acks: dict[str, _Ack] = {}
        self._tasks: dict[str, _Task] = {}
        self._roles: dict[str, int] = {}
        self._plans: dict[int, StepPlan] = {}
        self._checkpoints: dict[int, CheckpointRecord] = {}
        self._facts: dict[str, str] = {}

    @contextmanager
    def _mutation(self, fence: Fence | None) -> Iterator[None]:
        with self._changed:
            if fence is not None and self._roles.get(fence.role) != fence.epoch:
                raise fenced(fence, self._roles.get(fence.role, 0))
            yield
            self._lsn += 1
            self._changed.notify_all()

    # -- samples ---------------------------------------------------------------------------

    def commit_samples(self, refs: Sequence[SampleRef], *, fence: Fence | None = None) -> list[bool]:
        for ref in refs:
            ref_to_json(ref)  # refuses tensors and whatever a durable store could not carry
        with self._mutation(fence):
            return [self._commit(ref) for ref in refs]

    def _commit(self, ref: SampleRef) -> bool:
        known = self._samples.get(ref.sample_id)
        if known is not None and known.state != "lost":
            return False
        if known is None:
            self._samples[ref.sample_id] = _Sample(seq=len(self._samples) + 1, ref=ref)
        else:
            known.ref, known.state, known.compacted = ref, "present", False
        task = self._tasks.get(ref.source_task_id or "")
        if task is not None:
            task.state, task.holder, task.attempt = "done", "", 0
        return True

    def is_committed(self, sample_id: str) -> bool:
        with self._changed:
            return sample_id in self._samples

    def get_committed(self, sample_id: str) -> SampleRef | None:
        with self._changed:
            sample = self._samples.get(sample_id)
            return sample.ref if sample else None

    def committed_count(self) -> int:
        with self._changed:
            return len(self._samples)

    def all_committed_ids(self) -> list[str]:
        with self._changed:
            return list(self._samples)

    def read_committed(self, after_seq: int, limit: int) -> list[CommittedRef]:
        with self._changed:
            ids = list(self._samples)[after_seq : after_seq + limit]
            samples = [self._samples[i] for i in ids]
            return [CommittedRef(s.seq, s.ref, s.state != "lost") for s in samples]

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
            for sample_id in sample_ids:
                known = self._acks.get(sample_id)
                if known is None or not known.durable:
                    self._acks[sample_id] = _Ack(global_step, optimizer_durable)

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
                for task in self._tasks.values():
                    if task.state == "leased":
                        task.state, task.holder = "pending", ""
            if role == "consumer":
                self._acks = {i: ack for i, ack in self._acks.items() if ack.durable}
            return Fence(role, self._roles[role])

    def role_epochs(self) -> dict[str, int]:
        with self._changed:
            return dict(self._roles)

    # -- prompt tasks ----------------------------------------------------------------------

    def add_tasks(self, task_ids: Sequence[str]) -> int:
        with self._mutation(None):
            before = len(self._tasks)
            for task_id in task_ids:
                self._tasks.setdefault(task_id, _Task(ordinal=len(self._tasks)))
            return len(self._tasks) - before

    def lease_tasks(
        self, worker_id: str, limit: int, *, group_size: int | None = None, fence: Fence | None = None
    ) -> list[TaskLease]:
        with self._mutation(fence):
            pending = [(i, task) for i, task in self._tasks.items() if task.state == "pending"][:limit]
            if group_size is not None and pending:
                group = pending[0][1].ordinal // group_size
                pending = [(i, task) for i, task in pending if task.ordinal // group_size == group]
            for _, task in pending:
                task.state, task.holder = "leased", worker_id
            return [TaskLease(i, task.ordinal, task.attempt) for i, task in pending]

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
        return buried

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

    def record_plan(self, plan: StepPlan, *, fence: Fence | None = None) -> StepPlan:
        with self._mutation(fence):
            return self._plans.setdefault(plan.step, plan)

    def get_plan(self, step: int) -> StepPlan | None:
        with self._changed:
            return self._plans.get(step)

    # -- checkpoints -----------------------------------------------------------------------

    def record_checkpoint(self, checkpoint: CheckpointRecord, *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            head = max(self._checkpoints, default=-1)
            if checkpoint.step <= head:
                raise behind_head(checkpoint.step, head)
            self._checkpoints[checkpoint.step] = checkpoint
            for ack in self._acks.values():
                if ack.step is not None and ack.step <= checkpoint.step:
                    ack.durable = True

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
            self._checkpoints = {s: c for s, c in self._checkpoints.items() if s <= step}
            undone = {i for i, ack in self._acks.items() if ack.step is not None and ack.step > step}
            for sample_id in undone:
                del self._acks[sample_id]
            lost = [i for i, s in self._samples.items() if i in undone and s.state == "released"]
            self._lose(lost)
            return lost

    # -- features --------------------------------------------------------------------------

    def releasable(self, limit: int) -> list[str]:
        with self._changed:
            return [i for i, s in self._samples.items() if s.state == "present" and self._is_durable(i)][
                :limit
            ]

    def record_released(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            early = [i for i in sample_ids if i not in self._samples or not self._is_durable(i)]
            if early:
                raise not_covered(early)
            for sample_id in sample_ids:
                self._samples[sample_id].state = "released"

    def _is_durable(self, sample_id: str) -> bool:
        ack = self._acks.get(sample_id)
        return ack is not None and ack.durable

    def report_lost(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            self._lose([i for i in sample_ids if i in self._samples and not self._is_durable(i)])

    def _lose(self, sample_ids: Sequence[str]) -> None:
        for sample_id in sample_ids:
            sample = self._samples[sample_id]
            sample.state = "lost"
            task = self._tasks.get(sample.ref.source_task_id or "")
            if task is not None and task.state != "failed":
                task.state, task.holder = "pending", ""

    def present_ids(self) -> list[str]:
        return self._ids_in("present")

    def lost_ids(self) -> list[str]:
        return self._ids_in("lost")

    def _ids_in(self, state: str) -> list[str]:
        with self._changed:
            return [i for i, s in self._samples.items() if s.state == state]

    def usage(self) -> LedgerUsage:
        with self._changed:
            resident = {i: s.ref.estimated_bytes for i, s in self._samples.items() if s.state == "present"}
            provisional = [
                size for i, size in resident.items() if i in self._acks and not self._is_durable(i)
            ]
            waiting = [i for i, s in self._samples.items() if s.state != "released" and i not in self._acks]
            return LedgerUsage(
                len(resident), sum(resident.values()), len(provisional), sum(provisional), len(waiting)
            )

    def compact(self) -> int:
        with self._mutation(None):
            done = [s for s in self._samples.values() if s.state == "released" and not s.compacted]
            for sample in done:
                sample.ref, sample.compacted = compacted(sample.ref), True
            oldest = min(self._checkpoints, default=0)
            old_plans = [step for step in self._plans if step <= oldest]
            for step in old_plans:
                del self._plans[step]
            return len(done)

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
