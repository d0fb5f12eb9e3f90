"""The control plane's contract: one durable ledger, shared by every process of a run.

It holds metadata only (`assert_no_tensors` guards every write). A sample's life, with the call that moves
it and the role that makes the call:

    lease, reserve, commit (producer) -> plan, ack (consumer, provisional)
        -> head (consumer: THE commit point) -> bytes freed, release (consumer)

Every change is one transaction, raises the log number (`lsn`) by one and takes a fence. A call with the fence
of an older epoch changes nothing and raises FencedError. A fence numbers its calls upwards: a repetition of
the last one (its result was lost) changes nothing and returns the first result; an older one is refused.
Processes call the sessions (producer_session.py, consumer_session.py), which own fence and numbers; a fence
of None is for callers without a role: a start that binds the run or says where its features lie
(session.py, write_facts), and the seed's API (paceline.compat).
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
    Wanted,
)
from paceline.types import SampleRef

POLL_S = 0.003


class Ledger(ABC):
    """Adapters: stores/sqlite, stores/redis. Readable specification: testing/specification.py."""

    durable: bool = True  # whether the contents outlive the process
    sleep: Callable[[float], None] = staticmethod(time.sleep)
    clock: Callable[[], float] = staticmethod(time.monotonic)

    # -- roles -----------------------------------------------------------------------------

    @abstractmethod
    def acquire(self, role: str, holder: str, order: Order | None = None) -> Fence:
        """Take the role over: from now on every earlier fence of the role is refused.

        A producer's earlier leases become pending again, each with one more death, and its intents are
        revoked; other workers keep theirs. A consumer inherits no provisional acks, because the weights of
        those steps died with its predecessor; a step that was begun and not acked counts a death. The
        first caller that passes an `order` settles it; a caller with another one gets ConfigError.
        """

    # -- prompts ---------------------------------------------------------------------------

    @abstractmethod
    def extend(self, fence: Fence | None, /, blocks: Sequence[SourceBlock]) -> int:
        """Register prompts, in consecutive blocks; returns how many prompts were new.

        A known block must have the same bounds and digest (ConfigError otherwise). Blocks after the last
        known prompt are appended, and reopen the stream.
        """

    @abstractmethod
    def forget_prompts(self, fence: Fence | None, /) -> bool:
        """Forget the prompts and what was tried with them, so that others can be registered in their place.

        Nothing may hang on them: False, without a change, if a sample was committed, a prompt is leased or
        has failed, an intent stands, or a step is planned or covered by a checkpoint.
        """

    @abstractmethod
    def lease(
        self, fence: Fence | None, /, limit: int, group_size: int | None = None, below: int | None = None
    ) -> list[Lease]:
        """Lease the pending prompts of lowest ordinal, at most `limit`; without one nothing changes.

        With `group_size`, only prompts of one group (ordinal // group_size) of which no other worker holds
        a lease: if the engine fails on a group, one worker must be able to try its prompts one by one.
        With `below`, only prompts of lower ordinals, so that no worker runs too far ahead of a slow one.
        """

    @abstractmethod
    def give_back(
        self,
        fence: Fence | None,
        /,
        ordinals: Sequence[int],
        *,
        failure: str | None = None,
        attempt_max: int | None = None,
    ) -> list[int]:
        """End this worker's leases and revoke their intents; the prompts are pending again.

        A `failure` counts as an attempt. A prompt that has had `attempt_max` (None: one is enough) fails
        for good, with this reason: its place stays empty, and if its sample was lost, the sample is
        quarantined. Returns what failed for good.
        """

    @abstractmethod
    def end_stream(self, fence: Fence | None, /, ended: bool) -> bool:
        """End or reopen the stream; returns whether it is ended.

        It ends only if no prompt is pending or leased.
        """

    # -- bytes and samples -----------------------------------------------------------------

    @abstractmethod
    def reserve(
        self, fence: Fence | None, /, wanted: Sequence[Wanted], budget: Budget | None
    ) -> list[int] | None:
        """Record, before any byte is written, that these samples will be stored; returns their generations.

        None, without a change, if they do not fit into `budget` beside what is resident or promised to
        any worker.
        """

    @abstractmethod
    def commit(self, fence: Fence | None, /, refs: Sequence[SampleRef]) -> list[bool]:
        """Commit all refs in one transaction, idempotent on `sample_id`; returns which are fresh.

        Ends each ref's intent and its prompt's lease. A lost sample takes the new ref, keeps its place and
        counts as fresh. Not fresh: a sample that is known, one that durable weights contain by now (it is
        released and its new bytes are not needed), one whose prompt failed meanwhile. Raises TypeError for
        a tensor, and IntentRevokedError (then nothing is committed) if the intent of a ref is gone.
        """

    @abstractmethod
    def report_lost(self, fence: Fence | None, /, sample_ids: Sequence[str]) -> None:
        """Features are gone or damaged: the prompts are pending again, except those of durable samples."""

    @abstractmethod
    def swept(self, fence: Fence | None, /, generations: Sequence[int], skip_through: int = 0) -> None:
        """Forget these intents: their bytes are gone or were never written.

        Applies to revoked intents and to the worker's own; nothing can be committed under them afterwards.
        `skip_through`: never reserve a generation up to this one again; the store holds bytes of it that
        this ledger, an older copy, does not know.
        """

    # -- steps -----------------------------------------------------------------------------

    @abstractmethod
    def plan(
        self, fence: Fence | None, /, plan: StepPlan | None, ack: StepAck | None = None
    ) -> BegunStep | None:
        """Record the ack of the step before, and begin a step by recording its plan once.

        The plan on record wins; a higher `rev` replaces it, unless the step is acked already. Without a
        plan no step is begun then: one that was is left untrained on purpose, and no death is counted.
        Raises IllegalTransitionError, without a change, for an archived step or an ack out of turn.
        """

    # -- checkpoints -----------------------------------------------------------------------

    @abstractmethod
    def head(
        self,
        fence: Fence | None,
        /,
        checkpoint: CheckpointRecord,
        lineage: Sequence[TrainedStep] | None = None,
    ) -> None:
        """THE commit point: the checkpoint becomes head and every ack up to its step durable.

        Call only once the folder is durable. Idempotent. With `lineage` (the steps since the head) the ledger
        adopts a checkpoint that it does not know: samples that it lacks are entered as released, and
        prompts that the lineage passed over have failed. Raises IllegalTransitionError, without a change,
        if checkpoint or lineage contradict what is on record.
        """

    @abstractmethod
    def fall_back(self, fence: Fence | None, /, step: int) -> list[str]:
        """The head is damaged: return to the checkpoint at `step` (0: before the first step).

        Later acks are undone, durable ones too; samples that were released since become lost and their
        prompts pending again. Returns the lost ids. Raises IllegalTransitionError if the history after
        `step` is archived.
        """

    @abstractmethod
    def retire(self, fence: Fence | None, /, keep: int) -> int:
        """Drop the records of all but the newest `keep` checkpoints; the head always stays.

        Then archive steps up to the oldest one kept, and their samples, if there are enough of them: no
        recovery needs them. Returns how many samples were archived.
        """

    @abstractmethod
    def quarantine(
        self,
        fence: Fence | None,
        /,
        sample_ids: Sequence[str],
        *,
        step: int | None,
        reason: str,
    ) -> None:
        """Never train these samples again, for a durable reason. Nothing undoes it.

        Their features stay until a checkpoint covers `step`, because steps before it may be replayed.
        """

    @abstractmethod
    def release(self, fence: Fence | None, /, freed: Sequence[str], limit: int) -> dict[str, int]:
        """Record that these features are freed; returns up to `limit` samples whose features may go next.

        Those are samples that no step will need again, each with the generation of its bytes. Raises
        IllegalTransitionError, without a change, unless all that are freed were such samples.
        """

    # -- facts -----------------------------------------------------------------------------

    @abstractmethod
    def set_facts(
        self, fence: Fence | None, /, facts: Mapping[str, Any], *, settle: bool = False
    ) -> dict[str, Any]:
        """Write small JSON values in one transaction; returns the values that the keys have then.

        `settle`: write durably, and only if none of the keys has a value.
        """

    # -- reading ---------------------------------------------------------------------------

    @abstractmethod
    def lsn(self) -> int:
        """The number of changes so far."""

    @abstractmethod
    def snapshot(self) -> Snapshot: ...

    @abstractmethod
    def source_blocks(self, first: int = 0, limit: int | None = None) -> list[SourceBlock]:
        """The blocks that hold the prompts from `first` on."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Page:
        """Samples at places from `start` to below `stop`, as far as the log is settled.

        Archived samples (below the oldest checkpoint's `first_place`) are left out.
        """

    @abstractmethod
    def find(
        self,
        sample_ids: Sequence[str] | None = None,
        *,
        state: State | None = None,
        limit: int | None = None,
    ) -> dict[str, SampleRecord]:
        """Samples by id, in the order of their places: these (None: all), in this state, not archived."""

    @abstractmethod
    def failed(self, start: int = 0, stop: int | None = None) -> dict[int, str]:
        """Failed prompts from ordinal `start` to below `stop`, and the reason of each."""

    @abstractmethod
    def ownership(self) -> Ownership: ...

    @abstractmethod
    def history(self, *, step: int | None = None, sample_id: str | None = None) -> Iterator[TrainedStep]:
        """Planned steps in order, archived ones included: all, that one, or those that name the sample.

        `finished` is known only for acked samples. It may search the whole history: not for the hot path.
        """

    @property
    def unverified(self) -> tuple[str, ...]:
        """What could not be learnt of how safely the ledger is kept, in words for the user."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Idempotent; loses nothing."""

    def facts(self) -> dict[str, Any]:
        return dict(self.snapshot().facts)

    def position(self) -> str:
        """How far the ledger is, as text that a later process asks `missing_since` about."""
        return str(self.lsn())

    def missing_since(self, position: str) -> str:
        """What the ledger lacks of what it held at an earlier position, in words; "" for nothing.

        Raises ValueError for text that `position` did not write.
        """
        before, now = int(position), self.lsn()
        return "" if now >= before else f"the ledger has {now} changes, and had {before}"

    def step_plan(self, step: int) -> StepPlan | None:
        """The plan of a step; None if it has none."""
        return next((trained.plan for trained in self.history(step=step)), None)

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        """Block until `lsn() != seen_lsn` or the timeout; returns the current lsn. Polls every few ms."""
        deadline = self.clock() + timeout_s
        while (now := self.lsn()) == seen_lsn and (left := deadline - self.clock()) > 0:
            self.sleep(min(POLL_S, left))
        return now
