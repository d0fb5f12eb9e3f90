"""DataFlowController: what a role may do to the metadata store, in the words of the data flow.

It keeps prompt payloads in memory (they come from the prompt file, in the same order after any
restart) and everything else in the store, so a controller can die at any moment and be built
again. Both roles use one; each holds the fence of its own role.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol, TypeVar, runtime_checkable

from paceline.errors import LedgerError, UnknownResultError
from paceline.ledger.facts import RUN_ID
from paceline.ledger.records import BegunStep, Fence, StepAck, StepPlan, TaskLease
from paceline.ledger.store import MetadataStore
from paceline.ledger.stores.memory import InMemoryMetadataStore
from paceline.types import PromptTask, SampleRef, assert_no_tensors

ATTEMPT_MAX = 5
RELEASE_AT_ONCE = 1000
TRIES = 3  # of a call whose result stays unknown
T = TypeVar("T")


class OpIds:
    """Never the same twice, in any thread or in a process forked from this one; in order, so that a store
    keeps them close together."""

    def __init__(self) -> None:
        self._mine, self._numbers = uuid.uuid4().hex, count()

    def new(self) -> str:
        return f"{self._mine}-{os.getpid():x}-{next(self._numbers):012x}"


@runtime_checkable
class Frees(Protocol):
    """The one thing the controller asks of a feature store."""

    def free(self, written: Iterable[tuple[str, int]]) -> None: ...


class Aborts(Protocol):
    """The seed's way to say it."""

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
        self._unwritten_ack: StepAck | None = None
        self._op_ids = OpIds()
        self._bind()

    def _bind(self) -> None:
        owner = self.store.facts().get(RUN_ID)
        if owner is None:  # or another process settles it at this moment
            owner = self.store.settle_facts({RUN_ID: self.run_id})[RUN_ID]
        if owner != self.run_id:
            raise LedgerError(
                f"This metadata store belongs to run {owner!r}, not to {self.run_id!r}.",
                why="Mixing two runs would train samples into the wrong weights.",
                next=f"open it as {owner!r}, or give the new run its own store.",
            )

    def take_role(self, role: str) -> Fence:
        """Become the `role` of this run; every earlier holder is fenced from now on."""
        if role == "consumer":
            self._unwritten_ack = None
        holder = f"{socket.gethostname()}:{os.getpid()}"
        self._fences[role] = self.store.acquire_role(role, holder)
        return self._fences[role]

    def fence(self, role: str) -> Fence | None:
        """The fence this controller holds for the role, if it took it."""
        return self._fences.get(role)

    def _settled(self, call: Callable[[str], T]) -> T:
        """Make a call under an op id, and repeat it under the same one while its result is unknown."""
        op_id = self._op_ids.new()
        for tries_left in reversed(range(TRIES)):
            try:
                return call(op_id)
            except UnknownResultError:
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    # -- producer --------------------------------------------------------------------------

    def ingest_prompts(self, prompts: Sequence[Mapping[str, Any] | PromptTask]) -> list[str]:
        """Make the prompts known, in order; idempotent on task id. Returns the task ids.

        A mapping may name `task_id`; without one it gets its place in this call's order, so the
        same prompts in the same order get the same ids after a restart. What is not an own
        field of PromptTask is its payload.
        """
        tasks = [self._task(prompt, place) for place, prompt in enumerate(prompts)]
        self.store.add_tasks([task.task_id for task in tasks], fence=self.fence("producer"))
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

    def lease(self, worker_id: str, limit: int, *, group_size: int | None = None) -> list[TaskLease]:
        """Lease up to `limit` pending prompts, lowest ordinal first; [] when none is pending.

        With `group_size` the lease keeps to one capture group.
        """
        fence = self.fence("producer")
        return self._settled(
            lambda op_id: self.store.lease_tasks(
                worker_id, limit, group_size=group_size, fence=fence, op_id=op_id
            )
        )

    def lease_prompt_tasks(
        self, worker_id: str, max_tasks: int, *, group_size: int | None = None
    ) -> list[PromptTask]:
        """`lease`, as the tasks that were ingested here."""
        leases = self.lease(worker_id, max_tasks, group_size=group_size)
        unknown = [lease.task_id for lease in leases if lease.task_id not in self._tasks]
        if unknown:
            raise LedgerError(
                f"{len(unknown)} leased prompts were never ingested here (first: {unknown[0]}).",
                why="This process does not know their text.",
                next="call ingest_prompts with the run's whole prompt file before leasing.",
            )
        return [
            replace(
                self._tasks[lease.task_id],
                ordinal=lease.ordinal,
                attempt=lease.attempt,
                deaths=lease.deaths,
            )
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

    def return_prompt_tasks(self, worker_id: str, task_ids: Sequence[str]) -> None:
        """Give leases back without a failure."""
        self.store.return_tasks(worker_id, task_ids, fence=self.fence("producer"))

    def reserve(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Byte intents for samples about to be written (id to bytes); the generation of each."""
        fence = self.fence("producer")
        return self._settled(lambda op_id: self.store.reserve(sizes, fence=fence, op_id=op_id))

    def skip_generations(self, through: int) -> Fence:
        """Never reserve one up to `through`; this role's fence from now on."""
        fence = self._fences["producer"]
        self._fences["producer"] = self.store.skip_generations(through, fence=fence)
        return self._fences["producer"]

    def revoke(self, generations: Sequence[int]) -> None:
        """Give intents up; only then may their bytes be deleted."""
        self.store.revoke(generations, fence=self.fence("producer"))

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
        fence = self.fence("producer")
        fresh = self._settled(lambda op_id: self.store.commit_samples(refs, fence=fence, op_id=op_id))
        return [ref for ref, is_new in zip(refs, fresh, strict=True) if is_new]

    # -- consumer --------------------------------------------------------------------------

    def begin_step(self, plan: StepPlan) -> BegunStep:
        """Write down what the step will train before it does; the plan on record wins.

        The ack of the step before goes with it: one transaction for each step of a busy trainer.
        """
        fence, ack = self.fence("consumer"), self._unwritten_ack
        begun = self._settled(lambda op_id: self.store.begin_step(plan, ack=ack, fence=fence, op_id=op_id))
        self._unwritten_ack = None
        return begun

    def leave_step(self, step: int) -> None:
        """The step is not trained now after all; it will be, with the same plan."""
        self.store.leave_step(step, fence=self.fence("consumer"))

    def ack_step(self, step: int, rev: int, finished: Sequence[str]) -> None:
        """The weights in memory contain the step; `finished` had their last visit in it.

        Written down with the plan of the next step, or by `write_ack`. An ack is provisional: one that a
        crash takes away is of weights that it takes away, too.
        """
        self.write_ack()
        self._unwritten_ack = StepAck(step, rev, tuple(finished))

    def write_ack(self) -> None:
        """For who does not begin another step now: before a wait, a checkpoint, the end."""
        fence, ack = self.fence("consumer"), self._unwritten_ack
        if ack is not None:
            self._settled(lambda op_id: self.store.ack_step(ack, fence=fence, op_id=op_id))
            self._unwritten_ack = None

    def quarantine(self, sample_ids: Sequence[str], *, step: int | None, reason: str) -> None:
        """Never train these samples (again), and say why for good."""
        self.store.quarantine(sample_ids, step=step, reason=reason, fence=self.fence("consumer"))

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

    def release(self, feature_store: Frees) -> int:
        """Free the features of every sample that no step will need again; how many.

        A fenced call first, so that a consumer that was replaced frees nothing; then the bytes, by
        generation, so that not even a slow one can free what was captured since; the record last:
        a crash before it repeats the aborts, which are idempotent.
        """
        freed = 0
        while covered := self.store.begin_release(RELEASE_AT_ONCE, fence=self.fence("consumer")):
            feature_store.free(list(covered.items()))
            self.store.record_released(list(covered), fence=self.fence("consumer"))
            freed += len(covered)
            if len(covered) < RELEASE_AT_ONCE:
                break
        return freed

    def reconcile_on_restart(self, feature_store: Frees | Aborts | None = None) -> dict[str, Any]:
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
                if isinstance(feature_store, Frees):
                    feature_store.free([(sample_id, 0)])
                else:
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
            "samples_quarantined": len(self.store.quarantined()),
            "samples_resident": usage.resident_samples,
            "samples_provisional": usage.provisional_samples,
            "resident_bytes": usage.resident_bytes,
            "checkpoint_step": checkpoints[-1].step if checkpoints else None,
            "role_epochs": self.store.role_epochs(),
        }
