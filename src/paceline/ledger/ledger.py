"""The control plane's contract: one durable ledger, shared by every process of a run.

It holds metadata only (`assert_no_tensors` guards every write). A sample's life, with the verb
that moves it and the role that may:

    lease, reserve, commit (producer) -> plan, ack (consumer, provisional)
        -> head (consumer: THE commit point) -> releasable, bytes freed, released (consumer)

Every change is one transaction, raises the log number (`lsn`) by one and takes a fence and an operation
number. A call with the fence of an older epoch changes nothing and raises FencedError. Operations of one
fence are numbered upwards: the last one repeated (its result was lost) changes nothing and returns what
it returned before; an older one is refused. Processes call the sessions (producer_session.py,
consumer_session.py), which own both; a fence of None is for callers without a role: settling what a
run is, and the seed's API (paceline.compat).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from paceline.ledger.records import (
    BegunStep,
    Budget,
    CheckpointRecord,
    Fence,
    Intent,
    Lease,
    Order,
    Ownership,
    Page,
    SampleRecord,
    Snapshot,
    SourceBlock,
    State,
    StepAck,
    StepPlan,
    TrainedStep,
)
from paceline.types import SampleRef

POLL_S = 0.003


class Ledger(ABC):
    """Adapters: stores/sqlite. The readable specification: testing/specification.py."""

    durable: bool = True  # whether the contents outlive the process
    sleep: Callable[[float], None] = staticmethod(time.sleep)
    clock: Callable[[], float] = staticmethod(time.monotonic)

    # -- roles -----------------------------------------------------------------------------

    @abstractmethod
    def acquire(self, role: str, holder: str, order: Order | None = None) -> Fence:
        """Take the role over: every earlier fence of it is refused from now on.

        A producer's earlier leases return to pending, with a death on each, and its intents are revoked;
        other workers' are not touched. A consumer inherits no provisional acks: those steps' weights died
        with its predecessor; a step that was begun and not acked counts a death. `order` is settled by
        the first that asks for one; ConfigError for another.
        """

    @abstractmethod
    def evict(self, fence: Fence | None, op: int | None, worker: str) -> None:
        """Fence another producer, return its leases and revoke its intents."""

    # -- prompts ---------------------------------------------------------------------------

    @abstractmethod
    def extend(self, fence: Fence | None, op: int | None, blocks: Sequence[SourceBlock]) -> int:
        """Make prompts known: blocks that follow each other; how many prompts were new.

        Blocks that the ledger has must come with the same bounds and digest (ConfigError otherwise); what
        follows the last known prompt is appended, and reopens the stream.
        """

    @abstractmethod
    def lease(
        self, fence: Fence | None, op: int | None, limit: int, group_size: int | None = None
    ) -> list[Lease]:
        """Lease the pending prompts of lowest ordinal, at most `limit`.

        With `group_size` only those of one group (ordinal // group_size), and of none of which another
        worker holds a lease: a group is one worker's at a time, who may have to find out which of its
        prompts the engine cannot bear.
        """

    @abstractmethod
    def fail(
        self,
        fence: Fence | None,
        op: int | None,
        ordinals: Sequence[int],
        *,
        reason: str,
        attempt_max: int | None,
    ) -> list[int]:
        """End this worker's leases after a failure, and revoke their intents; what failed for good.

        A prompt is pending again until it has failed `attempt_max` times (None: failed at once). One that
        failed is a hole in the log for ever; a lost sample of it is quarantined.
        """

    @abstractmethod
    def give_back(self, fence: Fence | None, op: int | None, ordinals: Sequence[int]) -> None:
        """End this worker's leases without a failure, and revoke their intents: they are pending again."""

    @abstractmethod
    def end_stream(self, fence: Fence | None, op: int | None, ended: bool) -> bool:
        """Whether nothing will follow in the log. Ends it only if no prompt is pending or leased."""

    # -- bytes and samples -----------------------------------------------------------------

    @abstractmethod
    def reserve(
        self, fence: Fence | None, op: int | None, wanted: Sequence[Intent], budget: Budget | None
    ) -> list[int] | None:
        """Write down, before any byte is, that these samples will be stored; the generation of each.

        None, and nothing is changed, if they do not fit into `budget` beside what is resident or
        promised to any worker.
        """

    @abstractmethod
    def commit(self, fence: Fence | None, op: int | None, refs: Sequence[SampleRef]) -> list[bool]:
        """Commit all refs in one transaction, idempotent on `sample_id`; freshness of each.

        Ends each ref's intent and its prompt's lease. A sample that was lost takes the new ref, keeps its
        place and counts as fresh, unless durable weights contain it by now: then it is released and
        its new bytes are not wanted. Not fresh either: a prompt that failed meanwhile. Raises TypeError for
        a tensor, and IntentRevokedError (then nothing is committed) if the intent of a ref is gone.
        """

    @abstractmethod
    def report_lost(self, fence: Fence | None, op: int | None, sample_ids: Sequence[str]) -> None:
        """Features are gone or damaged: the prompts are pending again. Not of what is durable."""

    @abstractmethod
    def swept(
        self, fence: Fence | None, op: int | None, generations: Sequence[int], skip_through: int = 0
    ) -> None:
        """The bytes of these intents are gone, or were never written, so their names may be forgotten.

        Of revoked intents, and of the worker's own: nothing can be committed under them any more.
        `skip_through`: reserve none up to it from now on: bytes of it lie in the store, of which this
        ledger, an older copy, knows nothing.
        """

    # -- steps -----------------------------------------------------------------------------

    @abstractmethod
    def plan(
        self, fence: Fence | None, op: int | None, plan: StepPlan | None, ack: StepAck | None = None
    ) -> BegunStep | None:
        """Take the ack of the step before, and begin a step: write its plan, once.

        The plan on record is authoritative; a higher `rev` replaces it, unless the step is acked already.
        Raises IllegalTransitionError, and then nothing has changed, for a step that is archived or an ack
        out of turn.
        """

    @abstractmethod
    def leave(self, fence: Fence | None, op: int | None, step: int) -> None:
        """The step was begun and is not trained now, in good order: no death is counted."""

    # -- checkpoints -----------------------------------------------------------------------

    @abstractmethod
    def head(
        self,
        fence: Fence | None,
        op: int | None,
        checkpoint: CheckpointRecord,
        lineage: Sequence[TrainedStep] | None = None,
    ) -> None:
        """THE commit point: the checkpoint becomes head and every ack up to its step durable.

        Call only once the folder is durable. Idempotent. With `lineage` (the steps since the head) it is
        adopted: a checkpoint that this ledger never heard of, or forgot. Samples that the ledger lacks are
        then entered as released, and what the lineage passed over is failed. Raises
        IllegalTransitionError, changing nothing, if checkpoint or lineage contradict what is on record.
        """

    @abstractmethod
    def fall_back(self, fence: Fence | None, op: int | None, step: int) -> list[str]:
        """Head is damaged: return to the checkpoint at `step` (0: before the first step).

        Later acks are undone, durable ones too; samples released meanwhile become lost and
        their prompts pending again. Returns the lost ids. Raises IllegalTransitionError if the
        history up to there is archived.
        """

    @abstractmethod
    def forget(self, fence: Fence | None, op: int | None, step: int) -> None:
        """Drop the record of an old checkpoint; never of head."""

    @abstractmethod
    def quarantine(
        self,
        fence: Fence | None,
        op: int | None,
        sample_ids: Sequence[str],
        *,
        step: int | None,
        reason: str,
    ) -> None:
        """These samples are never trained again; terminal, with a durable reason.

        Their features stay until a checkpoint covers `step`, because steps before it may be replayed.
        """

    @abstractmethod
    def released(self, fence: Fence | None, op: int | None, sample_ids: Sequence[str]) -> None:
        """The features are freed. Raises IllegalTransitionError unless all were releasable."""

    @abstractmethod
    def compact(self, fence: Fence | None, op: int | None) -> int:
        """Archive what no recovery can need: steps up to the oldest checkpoint kept, and their samples."""

    # -- facts -----------------------------------------------------------------------------

    @abstractmethod
    def set_facts(
        self, fence: Fence | None, op: int | None, facts: Mapping[str, Any], *, settle: bool = False
    ) -> dict[str, Any]:
        """Write small JSON values in one transaction; what stands for the keys then.

        `settle`: durably, and only if none of the keys stands already.
        """

    # -- reading ---------------------------------------------------------------------------

    @abstractmethod
    def lsn(self) -> int:
        """The number of changes so far."""

    @abstractmethod
    def facts(self) -> dict[str, Any]: ...

    @abstractmethod
    def snapshot(self) -> Snapshot: ...

    @abstractmethod
    def source_blocks(self, first: int = 0, limit: int | None = None) -> list[SourceBlock]:
        """The blocks that hold the prompts from `first` on."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Page:
        """Samples at places from `start` to below `stop`, as far as the log is settled.

        What is archived (below the oldest checkpoint's `first_place`) is left out.
        """

    @abstractmethod
    def find(self, sample_ids: Sequence[str]) -> dict[str, SampleRecord]:
        """Those of the samples that are on record and not archived."""

    @abstractmethod
    def samples(self, state: State, limit: int | None = None) -> list[SampleRecord]:
        """Samples in that state and not archived, by place."""

    @abstractmethod
    def failed(self, start: int = 0, stop: int | None = None) -> dict[int, str]:
        """Failed prompts from ordinal `start` to below `stop`, and the reason of each."""

    @abstractmethod
    def ownership(self) -> Ownership: ...

    @abstractmethod
    def revoked(self) -> list[Intent]:
        """Intents that were revoked and whose bytes are not known to be swept."""

    @abstractmethod
    def releasable(self, fence: Fence | None, limit: int) -> dict[str, int]:
        """Samples whose features no step will need again, each with the generation of its bytes.

        For a deleter that holds its role: FencedError for any other.
        """

    @abstractmethod
    def step_plan(self, step: int) -> StepPlan | None:
        """The plan on record of a step that is not archived."""

    @abstractmethod
    def history(self, *, step: int | None = None, sample_id: str | None = None) -> Iterator[TrainedStep]:
        """Planned steps in order, archived ones included: all, that one, or those that name the sample.

        `finished` is only known of samples that are acked. For people: it may search the whole history.
        """

    @abstractmethod
    def close(self) -> None:
        """Idempotent. What was committed stays."""

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        """Block until `lsn() != seen_lsn` or the timeout; the current lsn. Looks every few ms."""
        deadline = self.clock() + timeout_s
        while (now := self.lsn()) == seen_lsn and (left := deadline - self.clock()) > 0:
            self.sleep(min(POLL_S, left))
        return now
