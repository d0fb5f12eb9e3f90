"""DataFlowController: what a role may do to the metadata store, in the words of the data flow.

It keeps prompt payloads in memory (they come from the prompt file, in the same order after any
restart) and everything else in the store, so a controller can die at any moment and be built
again. Both roles use one; each holds the fence of its own role.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from paceline.errors import LedgerError
from paceline.ledger.store import Fence, MetadataStore, StepPlan
from paceline.ledger.stores.memory import InMemoryMetadataStore
from paceline.types import PromptTask, SampleRef, assert_no_tensors

ATTEMPT_MAX = 5


class Aborts(Protocol):
    """The one thing the controller asks of a feature store."""

    def abort(self, sample_id: str, reason: str = "") -> None: ...


class DataFlowController:
    def __init__(
        self, run_id: str, *, metadata_store: MetadataStore | None = None, attempt_max: int = ATTEMPT_MAX
    ) -> None:
        """No store given: a private in-process one. Raises LedgerError for another run's store."""
        self.run_id = run_id
        self.store = InMemoryMetadataStore() if metadata_store is None else metadata_store
        self.attempt_max = attempt_max
        self._tasks: dict[str, PromptTask] = {}
        self._fences: dict[str, Fence] = {}
        self._bind()

    def _bind(self) -> None:
        owner = self.store.facts().get("run_id")
        if owner is None:
            self.store.set_facts({"run_id": self.run_id})
        elif owner != self.run_id:
            raise LedgerError(
                f"This metadata store belongs to run {owner!r}, not to {self.run_id!r}.",
                why="Mixing two runs would train samples into the wrong weights.",
                next=f"open it as {owner!r}, or give the new run its own store.",
            )

    def take_role(self, role: str) -> Fence:
        """Become the `role` of this run; every earlier holder is fenced from now on."""
        holder = f"{socket.gethostname()}:{os.getpid()}"
        self._fences[role] = self.store.acquire_role(role, holder)
        return self._fences[role]

    def fence(self, role: str) -> Fence | None:
        """The fence this controller holds for the role, if it took it."""
        return self._fences.get(role)

    # -- producer --------------------------------------------------------------------------

    def ingest_prompts(self, prompts: Sequence[Mapping[str, Any] | PromptTask]) -> list[str]:
        """Make the prompts known, in order; idempotent on task id. Returns the task ids.

        A mapping may name `task_id`; without one it gets its place in this call's order, so the
        same prompts in the same order get the same ids after a restart. What is not an own
        field of PromptTask is its payload.
        """
        tasks = [self._task(prompt, place) for place, prompt in enumerate(prompts)]
        self.store.add_tasks([task.task_id for task in tasks])
        self._tasks.update({task.task_id: task for task in tasks})
        return [task.task_id for task in tasks]

    def _task(self, prompt: Mapping[str, Any] | PromptTask, place: int) -> PromptTask:
        assert_no_tensors(prompt, path=f"prompt {place}")
        if isinstance(prompt, PromptTask):
            return prompt
        task_id = prompt.get("task_id")
        return PromptTask(
            task_id=str(f"{self.run_id}:{place}" if task_id is None else task_id),
            run_id=self.run_id,
            source_id=str(prompt.get("source_id", "prompts")),
            payload=prompt.get("payload", prompt),
            ordinal=place,
            max_length=int(prompt.get("max_length", 2048)),
            metadata=prompt.get("metadata", {}),
        )

    def lease_prompt_tasks(
        self, worker_id: str, max_tasks: int, *, group_size: int | None = None
    ) -> list[PromptTask]:
        """Lease up to `max_tasks` pending prompts, lowest ordinal first; [] when none is pending.

        With `group_size` the lease keeps to one capture group.
        """
        leases = self.store.lease_tasks(
            worker_id, max_tasks, group_size=group_size, fence=self.fence("producer")
        )
        unknown = [lease.task_id for lease in leases if lease.task_id not in self._tasks]
        if unknown:
            raise LedgerError(
                f"{len(unknown)} leased prompts were never ingested here (first: {unknown[0]}).",
                why="This process does not know their text.",
                next="call ingest_prompts with the run's whole prompt file before leasing.",
            )
        return [
            replace(self._tasks[lease.task_id], ordinal=lease.ordinal, attempt=lease.attempt)
            for lease in leases
        ]

    def fail_prompt_tasks(
        self, worker_id: str, task_ids: Sequence[str], reason: str, retryable: bool = True
    ) -> list[str]:
        """Give leases back after a failure; returns the ids that are failed for good.

        Retryable tasks are pending again until `attempt_max` attempts; others fail at once. The
        reason is durable.
        """
        return self.store.fail_tasks(
            worker_id,
            task_ids,
            reason=reason,
            attempt_max=self.attempt_max if retryable else None,
            fence=self.fence("producer"),
        )

    def commit_samples(
        self,
        worker_id: str,  # noqa: ARG002 (says who, for the reader of the call)
        refs: Sequence[SampleRef],
    ) -> list[SampleRef]:
        """Commit what `worker_id` captured in one transaction; returns the refs that were new.

        A retry after an unknown result is safe: what the first try committed is not new.
        """
        if not refs:
            return []
        fresh = self.store.commit_samples(refs, fence=self.fence("producer"))
        return [ref for ref, is_new in zip(refs, fresh, strict=True) if is_new]

    # -- consumer --------------------------------------------------------------------------

    def plan_step(self, step: int, refs: Sequence[SampleRef], last_seq: int) -> StepPlan:
        """Write down what the step will train before it does; the plan on record wins."""
        plan = StepPlan(step, tuple(ref.sample_id for ref in refs), last_seq)
        return self.store.record_plan(plan, fence=self.fence("consumer"))

    def ack_train_refs(
        self,
        trainer_id: str,  # noqa: ARG002 (says who, for the reader of the call)
        sample_ids: Sequence[str],
        *,
        global_step: int | None = None,
        optimizer_durable: bool = False,
    ) -> None:
        """Record that `trainer_id`'s optimizer step used the samples; see record_train_ack."""
        self.store.record_train_ack(
            list(sample_ids),
            global_step=global_step,
            optimizer_durable=optimizer_durable,
            fence=self.fence("consumer"),
        )

    def release(self, feature_store: Aborts) -> int:
        """Free the features of every sample that a durable checkpoint covers; how many.

        The bytes go first and the record second: a crash between them repeats an abort, which
        is idempotent. The other order would leak the bytes.
        """
        freed = 0
        while ids := self.store.releasable(limit=1000):
            for sample_id in ids:
                feature_store.abort(sample_id, reason="covered by a durable checkpoint")
            self.store.record_released(ids, fence=self.fence("consumer"))
            freed += len(ids)
        return freed

    def reconcile_on_restart(self, feature_store: Aborts | None = None) -> dict[str, Any]:
        """Sort every committed sample by its own ack after a crash. Idempotent.

        `released`: durably acked; the weights that survive contain it, and its features are
        freed. `requeued`: committed but not durably acked; it will be trained (again). Samples
        that were never committed are the producer's to retry. Both lists are in commit order.
        """
        marker = self.store.durable_marker()
        durable = marker["acked"] if marker["optimizer_durable"] else set()
        committed = self.store.all_committed_ids()
        released = [i for i in committed if i in durable]
        if feature_store is not None:
            for sample_id in released:
                feature_store.abort(sample_id, reason="reconciled: durably trained")
            self.store.record_released(released, fence=self.fence("consumer"))
        return {
            "requeued": [i for i in committed if i not in durable],
            "released": released,
            "global_step": marker["global_step"],
            "optimizer_durable": marker["optimizer_durable"],
        }

    # -- both ------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Counts that cost the same however long the run is."""
        tasks, usage = self.store.task_counts(), self.store.usage()
        checkpoints = self.store.checkpoints()
        return {
            "run_id": self.run_id,
            "prompts": sum(tasks.values()),
            "prompts_pending": tasks["pending"],
            "prompts_leased": tasks["leased"],
            "prompts_failed": tasks["failed"],
            "samples_committed": self.store.committed_count(),
            "samples_resident": usage.resident_samples,
            "samples_provisional": usage.provisional_samples,
            "resident_bytes": usage.resident_bytes,
            "checkpoint_step": checkpoints[-1].step if checkpoints else None,
            "role_epochs": self.store.role_epochs(),
        }
