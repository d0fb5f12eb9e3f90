"""The control plane's contract: one durable store, shared by every process of a run.

It holds metadata only (`assert_no_tensors` guards every write). A sample's life, with the verb
that moves it and the role that may:

    reserve (producer) -> commit (producer) -> begin_step (consumer) -> ack (consumer, provisional)
        -> record_checkpoint (consumer: THE commit point) -> begin_release, bytes freed, record_released

Invariants: `seq` counts commits from 1 without gaps and never changes; an ack is judged one by one
and a durable one is never undone by a later one; bytes are freed only once a durable checkpoint
covers them; a call that carries a `Fence` of an older epoch changes nothing and raises FencedError;
a call repeated with its `op_id` changes nothing and returns what the first one did. Every mutation
is one transaction and raises the store's log sequence number (`lsn`) by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from paceline.ledger.records import (
    BegunStep,
    CheckpointRecord,
    CommittedRef,
    Fence,
    Intent,
    LedgerUsage,
    SampleRecord,
    StepAck,
    StepPlan,
    TaskLease,
    TrainedStep,
)
from paceline.ledger.refusals import fenced
from paceline.types import SampleRef


class MetadataStore(ABC):
    """Adapters: stores/memory.py (the readable specification), stores/sqlite.py."""

    durable: ClassVar[bool]  # whether the contents outlive the process

    # -- byte intents ----------------------------------------------------------------------

    @abstractmethod
    def reserve(
        self, sizes: Mapping[str, int], *, fence: Fence | None = None, op_id: str | None = None
    ) -> dict[str, int]:
        """Write down, before any byte is, that these samples (id to bytes) will be stored.

        Returns the generation of each, to be carried by the bytes and by the ref. A new producer's
        `acquire_role` revokes them all.
        """

    @abstractmethod
    def revoke(self, generations: Sequence[int], *, fence: Fence | None = None) -> None:
        """Take intents back. Only then may their bytes be deleted; a commit of one is refused."""

    @abstractmethod
    def skip_generations(self, through: int, *, fence: Fence) -> Fence:
        """Reserve none up to `through`; the fence as if the role had been taken after that.

        For a producer that finds bytes of generations which its ledger, an older copy, never gave out.
        """

    @abstractmethod
    def intents(self) -> list[Intent]:
        """Those neither committed nor revoked, by generation."""

    # -- samples ---------------------------------------------------------------------------

    def commit_sample(self, ref: SampleRef, *, fence: Fence | None = None) -> bool:
        """Commit one ref; True if it is new, False if its id was committed before."""
        return self.commit_samples([ref], fence=fence)[0]

    @abstractmethod
    def commit_samples(
        self, refs: Sequence[SampleRef], *, fence: Fence | None = None, op_id: str | None = None
    ) -> list[bool]:
        """Commit all refs in one transaction, idempotent on `sample_id`; freshness of each.

        Ends each ref's intent and marks its prompt task done. A sample reported lost takes the new
        ref, keeps its seq, and counts as fresh, unless durable weights contain it by now: then it is
        released and its new bytes are not wanted. Raises TypeError for a tensor, and IntentRevokedError
        (then nothing is committed) if a ref carries a generation whose intent is gone.
        """

    @abstractmethod
    def is_committed(self, sample_id: str) -> bool: ...

    @abstractmethod
    def get_committed(self, sample_id: str) -> SampleRef | None:
        """The ref; without keys, specs and metadata once the sample's history was folded away."""

    @abstractmethod
    def sample_record(self, sample_id: str) -> SampleRecord | None:
        """What became of a sample. May search the whole history: for people, not for the data flow."""

    @abstractmethod
    def committed_count(self) -> int: ...

    @abstractmethod
    def all_committed_ids(self) -> list[str]:
        """Ids in commit order, of the whole history."""

    @abstractmethod
    def read_committed(self, after_seq: int, limit: int) -> list[CommittedRef]:
        """The committed log: refs with seq > `after_seq`, in seq order, at most `limit`."""

    # -- acks ------------------------------------------------------------------------------

    @abstractmethod
    def record_train_ack(
        self,
        sample_ids: Sequence[str],
        *,
        global_step: int | None,
        optimizer_durable: bool,
        fence: Fence | None = None,
    ) -> None:
        """Record that an optimizer step used the samples. All or nothing, idempotent.

        `optimizer_durable` says that a durable checkpoint covers the step. It holds for the
        named ids alone and is never taken back by a later ack.
        """

    @abstractmethod
    def ack_step(self, ack: StepAck, *, fence: Fence | None = None, op_id: str | None = None) -> None:
        """Provisional: the weights in memory contain the step; see also `begin_step`.

        Raises IllegalTransitionError unless its `rev` is the plan on record and the step before is acked.
        """

    @abstractmethod
    def durable_marker(self) -> dict[str, Any]:
        """{"acked": set of ids, "global_step": int | None, "optimizer_durable": bool}.

        While any ack is durable: the durably acked ids, the highest step among them, True.
        Before that: the provisionally acked ids, their highest step, False. So "acked and
        optimizer_durable" is true of exactly the ids that are safe to release.
        """

    # -- roles -----------------------------------------------------------------------------

    @abstractmethod
    def acquire_role(self, role: str, holder: str) -> Fence:
        """Take the role over in one transaction: every earlier fence of it is refused from now on.

        A new producer inherits neither leases (they return to pending, a death on each) nor intents.
        A new consumer inherits no provisional acks: those steps' weights died with its predecessor. A
        step that was begun and not acked counts a death.
        """

    @abstractmethod
    def role_epochs(self) -> dict[str, int]:
        """How often each role has been acquired."""

    def refuse_if_replaced(self, fence: Fence | None) -> None:
        """Raises FencedError if another process holds the role by now; for who waits, or touches files."""
        if fence is not None and (current := self.role_epochs()[fence.role]) != fence.epoch:
            raise fenced(fence, current)

    # -- prompt tasks ----------------------------------------------------------------------

    @abstractmethod
    def add_tasks(self, task_ids: Sequence[str], *, fence: Fence | None = None) -> int:
        """Append tasks in order, idempotent on id; how many were new."""

    @abstractmethod
    def lease_tasks(
        self,
        worker_id: str,
        limit: int,
        *,
        group_size: int | None = None,
        fence: Fence | None = None,
        op_id: str | None = None,
    ) -> list[TaskLease]:
        """Lease the pending tasks of lowest ordinal, at most `limit`.

        With `group_size` only those of the first one's group (ordinal // group_size).
        """

    @abstractmethod
    def fail_tasks(
        self,
        worker_id: str,
        task_ids: Sequence[str],
        *,
        reason: str,
        attempt_max: int | None,
        fence: Fence | None = None,
    ) -> list[str]:
        """End this worker's leases after a failure; ids that are failed for good.

        A task returns to pending until it has failed `attempt_max` times (None: at once failed).
        """

    @abstractmethod
    def return_tasks(self, worker_id: str, task_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        """End this worker's leases without a failure; the tasks are pending again."""

    @abstractmethod
    def task_counts(self) -> dict[str, int]:
        """Tasks in each of the states pending, leased, done, failed."""

    @abstractmethod
    def failed_tasks(self) -> dict[str, str]:
        """Failed task ids and the reason of each."""

    # -- step plans ------------------------------------------------------------------------

    @abstractmethod
    def begin_step(
        self,
        plan: StepPlan,
        *,
        ack: StepAck | None = None,
        fence: Fence | None = None,
        op_id: str | None = None,
    ) -> BegunStep:
        """Write the step's plan, once, and that it begins now; the plan on record is authoritative.

        A higher `rev` than that on record replaces it, unless the step is acked already. `ack`: of the
        step before, in the same transaction (see `ack_step`). Raises IllegalTransitionError, and then
        nothing has changed, for a step whose history was folded away or an ack that is refused.
        """

    @abstractmethod
    def leave_step(self, step: int, *, fence: Fence | None = None) -> None:
        """The step was begun and is not trained now, in good order: no death is counted."""

    @abstractmethod
    def get_plan(self, step: int) -> StepPlan | None: ...

    @abstractmethod
    def plans(self) -> Iterator[StepPlan]:
        """Every plan in step order, folded ones included."""

    @abstractmethod
    def trained_step(self) -> int:
        """The last step acked since the head, or the head's own; 0 before any."""

    # -- checkpoints -----------------------------------------------------------------------

    @abstractmethod
    def record_checkpoint(self, checkpoint: CheckpointRecord, *, fence: Fence | None = None) -> None:
        """THE commit point: the checkpoint becomes head and every ack up to its step durable.

        Call only once the folder is durable. Idempotent. Raises IllegalTransitionError if the step is
        behind head, or if its chain is not that of the plans on record.
        """

    @abstractmethod
    def adopt_checkpoint(
        self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep], *, fence: Fence | None = None
    ) -> None:
        """Roll forward to a durable checkpoint that this ledger never heard of, or forgot.

        `lineage`: the steps from head to it. Samples that the ledger lacks are entered as released,
        their prompts done. Raises IllegalTransitionError, changing nothing, if the lineage contradicts
        the head, a plan, a sample's place, its last visit or a quarantine on record.
        """

    @abstractmethod
    def checkpoints(self) -> list[CheckpointRecord]:
        """Retained checkpoints, oldest first; the last one is head."""

    @abstractmethod
    def forget_checkpoint(self, step: int, *, fence: Fence | None = None) -> None:
        """Drop the record of an old checkpoint; never of head."""

    @abstractmethod
    def fall_back(self, step: int, *, fence: Fence | None = None) -> list[str]:
        """Head is damaged: return to the checkpoint at `step` (0: before the first step).

        Later acks are undone, durable ones too; samples released meanwhile become lost and
        their prompts pending again. Returns the lost ids. Raises IllegalTransitionError if the
        history up to there was folded away.
        """

    # -- poison ----------------------------------------------------------------------------

    @abstractmethod
    def quarantine(
        self, sample_ids: Sequence[str], *, step: int | None, reason: str, fence: Fence | None = None
    ) -> None:
        """These samples are never trained again; terminal, with a durable reason.

        Their features stay until a checkpoint covers `step`, because steps before it may be replayed.
        """

    @abstractmethod
    def quarantined(self, among: Sequence[str] | None = None) -> dict[str, str]:
        """Quarantined sample ids and the reason of each, in seq order; of those in `among`, if given."""

    # -- features --------------------------------------------------------------------------

    @abstractmethod
    def releasable(self, limit: int) -> list[str]:
        """Samples whose features no step will need again and that are not freed yet, in seq order."""

    @abstractmethod
    def begin_release(self, limit: int, *, fence: Fence | None = None) -> dict[str, int]:
        """`releasable`, each with the generation its bytes were written under (0: with none), for a deleter
        that holds its role: a fenced one frees nothing."""

    @abstractmethod
    def record_released(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        """The features are freed. Raises IllegalTransitionError unless all were releasable.

        The ref of a quarantined one keeps its ids only: nobody will look for its bytes.
        """

    @abstractmethod
    def report_lost(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        """Features are gone or damaged: the prompts are pending again, under the same ordinals."""

    @abstractmethod
    def present_ids(self) -> list[str]:
        """Samples whose features the feature store should hold, in seq order."""

    @abstractmethod
    def present_generations(self) -> dict[str, int]:
        """The same, each with the generation its bytes were written under."""

    @abstractmethod
    def lost_ids(self) -> list[str]:
        """Samples that wait to be captured again, in seq order."""

    @abstractmethod
    def usage(self) -> LedgerUsage: ...

    @abstractmethod
    def compact(self, *, fence: Fence | None = None) -> int:
        """Fold what only history needs (trained samples and plans up to the oldest checkpoint kept)."""

    # -- run -------------------------------------------------------------------------------

    @abstractmethod
    def set_facts(self, facts: Mapping[str, Any], *, fence: Fence | None = None) -> None:
        """Write small JSON values (run identity, end of stream, requests) in one transaction."""

    @abstractmethod
    def settle_facts(self, facts: Mapping[str, Any], *, fence: Fence | None = None) -> dict[str, Any]:
        """Write them, durably, unless one of their keys stands; what stands for the keys then."""

    @abstractmethod
    def facts(self) -> dict[str, Any]: ...

    @abstractmethod
    def lsn(self) -> int:
        """The number of mutations so far."""

    @abstractmethod
    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        """Block until `lsn() != seen_lsn` or the timeout; the current lsn. Never busy-polls."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent. What was committed stays."""
