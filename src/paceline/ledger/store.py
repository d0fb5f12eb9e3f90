"""The control plane's contract: one durable store, shared by every process of a run.

It holds metadata only (`assert_no_tensors` guards every write). A sample's life, with the verb
that moves it and the role that may:

    commit (producer) -> plan (consumer) -> ack (consumer, provisional)
        -> cover (consumer's checkpoint: THE commit point) -> release (consumer) -> bytes freed

Invariants: `seq` is the order of commit and never changes; an ack is judged one by one and a
durable one is never undone by a later one; a sample is released only once it is durable; a
call that carries a `Fence` of an older epoch changes nothing and raises FencedError. Every
mutation is one transaction and raises the store's log sequence number (`lsn`) by one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from paceline.types import SampleRef


@dataclass(frozen=True)
class Fence:
    """The right to write as `role`, until another process acquires the role."""

    role: str
    epoch: int


@dataclass(frozen=True)
class CommittedRef:
    """A committed ref at its place in the stream. `present` is False while its features are lost."""

    seq: int
    ref: SampleRef
    present: bool = True


@dataclass(frozen=True)
class TaskLease:
    """The right to capture one prompt; `ordinal` is its place in the run's prompt order."""

    task_id: str
    ordinal: int
    attempt: int


@dataclass(frozen=True)
class StepPlan:
    """The samples of one optimizer step, in order: written before the step, replayed exactly."""

    step: int
    sample_ids: tuple[str, ...]
    last_seq: int

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join((str(self.step), *self.sample_ids)).encode()).hexdigest()


@dataclass(frozen=True)
class CheckpointRecord:
    """A durable checkpoint: the folder's name, and the digest of its manifest."""

    step: int
    name: str
    manifest_digest: str
    last_seq: int


@dataclass(frozen=True)
class LedgerUsage:
    """Counts and bytes of committed samples that are not released.

    resident: their features occupy the feature store; provisional: resident and acked, but by
    no durable checkpoint; waiting: not acked at all (lost ones included).
    """

    resident_samples: int
    resident_bytes: int
    provisional_samples: int
    provisional_bytes: int
    waiting_samples: int


class MetadataStore(ABC):
    """Adapters: stores/memory.py (the readable specification), stores/sqlite.py."""

    durable: ClassVar[bool]  # whether the contents outlive the process

    # -- samples ---------------------------------------------------------------------------

    def commit_sample(self, ref: SampleRef, *, fence: Fence | None = None) -> bool:
        """Commit one ref; True if it is new, False if its id was committed before."""
        return self.commit_samples([ref], fence=fence)[0]

    @abstractmethod
    def commit_samples(self, refs: Sequence[SampleRef], *, fence: Fence | None = None) -> list[bool]:
        """Commit all refs in one transaction, idempotent on `sample_id`; freshness of each.

        Marks each ref's prompt task done. A sample reported lost takes the new ref, keeps its
        seq, and counts as fresh. Durable on return. Raises TypeError for a tensor.
        """

    @abstractmethod
    def is_committed(self, sample_id: str) -> bool: ...

    @abstractmethod
    def get_committed(self, sample_id: str) -> SampleRef | None: ...

    @abstractmethod
    def committed_count(self) -> int: ...

    @abstractmethod
    def all_committed_ids(self) -> list[str]:
        """Ids in commit order."""

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

        A new producer inherits no leases: they return to pending. A new consumer inherits no
        provisional acks: those steps' weights died with its predecessor.
        """

    @abstractmethod
    def role_epochs(self) -> dict[str, int]:
        """How often each role has been acquired."""

    # -- prompt tasks ----------------------------------------------------------------------

    @abstractmethod
    def add_tasks(self, task_ids: Sequence[str]) -> int:
        """Append tasks in order, idempotent on id; how many were new."""

    @abstractmethod
    def lease_tasks(
        self, worker_id: str, limit: int, *, group_size: int | None = None, fence: Fence | None = None
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
    def task_counts(self) -> dict[str, int]:
        """Tasks in each of the states pending, leased, done, failed."""

    @abstractmethod
    def failed_tasks(self) -> dict[str, str]:
        """Failed task ids and the reason of each."""

    # -- step plans ------------------------------------------------------------------------

    @abstractmethod
    def record_plan(self, plan: StepPlan, *, fence: Fence | None = None) -> StepPlan:
        """Write the plan of a step once and return the stored one, which is authoritative."""

    @abstractmethod
    def get_plan(self, step: int) -> StepPlan | None: ...

    # -- checkpoints -----------------------------------------------------------------------

    @abstractmethod
    def record_checkpoint(self, checkpoint: CheckpointRecord, *, fence: Fence | None = None) -> None:
        """THE commit point: the checkpoint becomes head and every ack up to its step durable.

        Call only once the folder is durable. Raises IllegalTransitionError if the step is behind head.
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
        their prompts pending again. Returns the lost ids.
        """

    # -- features --------------------------------------------------------------------------

    @abstractmethod
    def releasable(self, limit: int) -> list[str]:
        """Durable samples whose features are not released yet, in seq order."""

    @abstractmethod
    def record_released(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        """The features may be freed now. Raises IllegalTransitionError unless all are durable."""

    @abstractmethod
    def report_lost(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        """Features are gone or damaged: the prompts are pending again, under the same ordinals."""

    @abstractmethod
    def present_ids(self) -> list[str]:
        """Samples whose features the feature store should hold, in seq order."""

    @abstractmethod
    def lost_ids(self) -> list[str]:
        """Samples that wait to be captured again, in seq order."""

    @abstractmethod
    def usage(self) -> LedgerUsage: ...

    @abstractmethod
    def compact(self) -> int:
        """Shrink what only replay would need of released samples and covered plans; how many."""

    # -- run -------------------------------------------------------------------------------

    @abstractmethod
    def set_facts(self, facts: Mapping[str, Any], *, fence: Fence | None = None) -> None:
        """Write small JSON values (run identity, end of stream, requests) in one transaction."""

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


def compacted(ref: SampleRef) -> SampleRef:
    """The ref without what only a reader of its (freed) features would need."""
    return replace(ref, feature_keys={}, feature_specs={}, metadata={})
