"""DataFlowController: the earlier API of both roles, over a metadata store.

It keeps prompt payloads in memory (they come from the prompt file, in the same order after any
restart) and everything else in the store, so a process can die at any moment and build a new
controller.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from paceline.compat.stores import TASK_IDS, InMemoryMetadataStore, MetadataStore, ordinals_of
from paceline.errors import LedgerError
from paceline.ledger.records import CONSUMER, Fence, Order, SourceBlock, producer_role
from paceline.ledger.session import bind_run_id
from paceline.types import PromptTask, SampleRef, assert_no_tensors

ATTEMPT_MAX = 5
RELEASE_AT_ONCE = 1000


@runtime_checkable
class Frees(Protocol):
    """The one method that the controller needs of a feature store."""

    def free(self, written: Iterable[tuple[str, int]]) -> None: ...


class Aborts(Protocol):
    """A feature store of the seed, which frees by `abort`."""

    def abort(self, sample_id: str, reason: str = "") -> None: ...


class DataFlowController:
    def __init__(
        self, run_id: str, *, metadata_store: MetadataStore | None = None, attempt_max: int = ATTEMPT_MAX
    ) -> None:
        """Without a store it uses a private one in memory. Raises LedgerError for another run's store."""
        self.run_id = run_id
        self.store = InMemoryMetadataStore() if metadata_store is None else metadata_store
        self.attempt_max = attempt_max
        self._tasks: dict[str, PromptTask] = {}
        self._leased: dict[str, str] = {}  # task id to the worker that leased it here
        self._fences: dict[str, Fence] = {}
        bind_run_id(self.store, run_id)

    def take_role(self, role: str) -> Fence:
        """Take the `role` ("producer" or "consumer"), which fences every earlier holder."""
        holder = f"{socket.gethostname()}:{os.getpid()}"
        if role == CONSUMER:
            self._fences[role] = self.store.acquire(CONSUMER, holder)
        else:
            self._fences[role] = self.store.acquire(producer_role("0"), holder, Order.ARRIVAL)
        return self._fences[role]

    def fence(self, role: str) -> Fence | None:
        """The fence that this controller holds for the role; None if it did not take it."""
        return self._fences.get(role)

    # -- producer --------------------------------------------------------------------------

    def ingest_prompts(self, prompts: Sequence[Mapping[str, Any] | PromptTask]) -> list[str]:
        """Register the prompts in order; idempotent on task id. Returns the task ids.

        A mapping may name `task_id`; without one its place in this call is the id, so the same
        prompts in the same order get the same ids after a restart. Fields that PromptTask lacks are
        its payload.
        """
        tasks = [self._task(prompt, place) for place, prompt in enumerate(prompts)]
        known = self.store.task_ids()
        new = [task.task_id for task in tasks if task.task_id not in set(known)]
        if new:
            fence = self.fence("producer")
            digest = hashlib.sha256(json.dumps(new).encode()).hexdigest()
            self.store.extend(fence, [SourceBlock(len(known), len(new), digest)])
            self.store.set_facts(fence, {TASK_IDS: [*known, *new]})
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
        """Lease up to `max_tasks` pending prompts, lowest ordinal first; [] if none is pending.

        With `group_size` all leased prompts are of one capture group.
        """
        ids = self.store.task_ids()
        leases = self.store.lease(self.fence("producer"), max_tasks, group_size)
        unknown = [ids[lease.ordinal] for lease in leases if ids[lease.ordinal] not in self._tasks]
        if unknown:
            raise LedgerError(
                f"{len(unknown)} leased prompts were never ingested here (first: {unknown[0]}).",
                why="This process does not know their text.",
                next="call ingest_prompts with the run's whole prompt file before leasing.",
            )
        self._leased.update({ids[lease.ordinal]: worker_id for lease in leases})
        return [
            replace(self._tasks[ids[x.ordinal]], ordinal=x.ordinal, attempt=x.attempt, deaths=x.deaths)
            for x in leases
        ]

    def _held(self, worker_id: str, task_ids: Sequence[str]) -> list[int]:
        """The ordinals of the tasks among these that the worker leased here."""
        mine = [i for i in task_ids if self._leased.get(i) == worker_id]
        return [ordinal for ordinal in ordinals_of(self.store, mine) if ordinal is not None]

    def fail_prompt_tasks(
        self, worker_id: str, task_ids: Sequence[str], reason: str, retryable: bool = True
    ) -> list[str]:
        """Give leases back after a failure; returns the ids of prompts that failed for good.

        Retryable tasks are pending again until `attempt_max` attempts; others fail at once. The
        reason is durable.
        """
        failed = self.store.give_back(
            self.fence("producer"),
            self._held(worker_id, task_ids),
            failure=reason,
            attempt_max=self.attempt_max if retryable else None,
        )
        ids = self.store.task_ids()
        return [ids[ordinal] for ordinal in failed]

    def return_prompt_tasks(self, worker_id: str, task_ids: Sequence[str]) -> None:
        """Give leases back without a failure."""
        self.store.give_back(self.fence("producer"), self._held(worker_id, task_ids))

    def commit_samples(
        self,
        worker_id: str,  # noqa: ARG002 (for the reader of the call)
        refs: Sequence[SampleRef],
    ) -> list[SampleRef]:
        """Commit the samples that `worker_id` captured, in one transaction; returns the new refs.

        A retry after an unknown result is safe: refs that the first try committed are not new.
        """
        if not refs:
            return []
        ordinals = ordinals_of(self.store, [ref.source_task_id for ref in refs])
        placed = [replace(ref, ordinal=ordinal) for ref, ordinal in zip(refs, ordinals, strict=True)]
        fresh = self.store.commit(self.fence("producer"), placed)
        return [ref for ref, is_new in zip(refs, fresh, strict=True) if is_new]

    # -- consumer --------------------------------------------------------------------------

    def ack_train_refs(
        self,
        trainer_id: str,  # noqa: ARG002 (for the reader of the call)
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
            fence=self.fence(CONSUMER),
        )

    def release(self, feature_store: Frees | Aborts) -> int:
        """Free the features of every sample that is durably acked; returns their number."""
        freed = 0
        covered = self.store.release(self.fence(CONSUMER), [], RELEASE_AT_ONCE)
        while covered:
            _free(feature_store, list(covered.items()))
            freed += len(covered)
            covered = self.store.release(self.fence(CONSUMER), list(covered), RELEASE_AT_ONCE)
        return freed

    def reconcile_on_restart(self, feature_store: Frees | Aborts | None = None) -> dict[str, Any]:
        """Sort every committed sample by its own ack after a crash. Idempotent.

        `released`: durably acked samples; the surviving weights contain them, and their features are
        freed. `requeued`: committed samples without a durable ack; they will be trained (again). The
        producer retries samples that were never committed. Both lists are in commit order.
        """
        marker = self.store.durable_marker()
        durable = marker["acked"] if marker["optimizer_durable"] else set()
        committed = self.store.all_committed_ids()
        released = [i for i in committed if i in durable]
        if feature_store is not None:
            _free(feature_store, [(sample_id, 0) for sample_id in released])
            self.store.record_released(released, fence=self.fence(CONSUMER))
        return {
            "requeued": [i for i in committed if i not in durable],
            "released": released,
            "global_step": marker["global_step"],
            "optimizer_durable": marker["optimizer_durable"],
        }

    # -- both ------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Counts, at a cost that does not grow with the run."""
        now = self.store.snapshot()
        return {
            "run_id": self.run_id,
            "prompts": now.prompts.known,
            "prompts_pending": now.prompts.pending,
            "prompts_leased": now.prompts.leased,
            "prompts_failed": now.prompts.failed,
            "samples_committed": now.committed,
            "samples_quarantined": now.quarantined,
            "samples_resident": now.usage.resident_samples,
            "samples_provisional": now.usage.provisional_samples,
            "resident_bytes": now.usage.resident_bytes,
            "checkpoint_step": now.head.step if now.head else None,
            "role_epochs": dict(now.epochs),
        }


def _free(feature_store: Frees | Aborts, written: Sequence[tuple[str, int]]) -> None:
    if isinstance(feature_store, Frees):
        feature_store.free(written)
    else:
        for sample_id, _ in written:
            feature_store.abort(sample_id, reason="durably trained")
