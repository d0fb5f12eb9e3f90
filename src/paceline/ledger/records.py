"""The plain records that the ledger takes and returns, and the hash of a lineage.

A *place* is a position in the log of samples, counted from 0. It is usually the prompt's ordinal, so that
plans and weights follow from the prompts alone; in arrival order it is the number of earlier commits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from paceline.types import SampleRef

CONSUMER = "consumer"


class Order(StrEnum):
    """What decides a sample's place in the log. The first producer or commit settles it for the whole run."""

    ORDINAL = "ordinal"  # the ordinal of its prompt; prompts that fail leave holes
    ARRIVAL = "arrival"  # how many were committed before it


@dataclass(frozen=True)
class Fence:
    """The right to write as `role`, until the role is acquired again.

    `role` is "consumer", or "producer:" and the worker's name. `op` is the number of one call under it;
    without a number a call cannot be repeated.
    """

    role: str
    epoch: int
    op: int | None = None

    @property
    def worker(self) -> str:
        """The producer's name; "" for the consumer."""
        return self.role.partition(":")[2]

    def call(self, op: int) -> Fence:
        return replace(self, op=op)


def producer_role(worker: str) -> str:
    return f"producer:{worker}"


@dataclass(frozen=True)
class SourceBlock:
    """`count` prompts from ordinal `first` on, identified by the digest of their content."""

    first: int
    count: int
    digest: str


@dataclass(frozen=True)
class Lease:
    """The right to capture the prompt at `ordinal`.

    `attempt` counts failures; `deaths` counts processes that died while they held the lease.
    """

    ordinal: int
    attempt: int = 0
    deaths: int = 0


@dataclass(frozen=True)
class Budget:
    """The most that may be resident or promised at once; None: samples are not limited."""

    num_bytes: int
    num_samples: int | None = None


@dataclass(frozen=True)
class Wanted:
    """One sample about to be written: its prompt's ordinal, its id, and its size at most.

    Reserved, it is an *intent*: a worker's right to write it under a generation, a number never used twice.
    """

    ordinal: int
    sample_id: str
    num_bytes: int


class State(StrEnum):
    """The state of a committed sample."""

    PRESENT = "present"  # the feature store holds its bytes
    LOST = "lost"  # its prompt must be captured again
    RELEASED = "released"  # durable weights contain it, and its bytes are freed
    QUARANTINED = "quarantined"  # it is never trained (again); the reason is on record


@dataclass(frozen=True)
class Entry:
    """One committed sample at its place in the log. The ref of an archived sample holds only its id."""

    place: int
    ref: SampleRef
    state: State = State.PRESENT

    @property
    def sample_id(self) -> str:
        return self.ref.sample_id


@dataclass(frozen=True)
class Page:
    """Entries of the settled part of the log.

    `settled`: every place below it holds a committed sample or will stay empty. `closed`: no sample
    will follow.
    """

    entries: tuple[Entry, ...]
    settled: int
    closed: bool


@dataclass(frozen=True)
class SampleRecord:
    """What the ledger knows of one sample.

    `step`: the step that acked it (its last visit), or whose plan it was quarantined from. `resident`: the
    feature store should hold its bytes.
    """

    sample_id: str
    place: int
    state: State
    ref: SampleRef
    step: int | None = None
    durable: bool = False
    reason: str = ""
    resident: bool = False


@dataclass(frozen=True)
class StepPlan:
    """The samples of one optimizer step, in order: recorded before the step and replayed exactly.

    `rev` grows when a planned sample is quarantined.
    """

    step: int
    sample_ids: tuple[str, ...]
    rev: int = 0

    @property
    def digest(self) -> str:
        head = str(self.step) if self.rev == 0 else f"{self.step}.{self.rev}"
        return hashlib.sha256("\n".join((head, *self.sample_ids)).encode()).hexdigest()


@dataclass(frozen=True)
class StepAck:
    """The weights in memory contain revision `rev` of `step`.

    `finished`: the samples that were visited for the last time.
    """

    step: int
    rev: int
    finished: tuple[str, ...]


@dataclass(frozen=True)
class BegunStep:
    """The plan on record, and how many consumers died between beginning and acking it."""

    plan: StepPlan
    deaths: int


@dataclass(frozen=True)
class TrainedSample:
    """One sample of a trained step; `finished` if this was its last visit."""

    place: int
    sample_id: str
    ordinal: int | None
    finished: bool


def order_of(samples: Iterable[TrainedSample]) -> Order:
    """The order that a lineage tells: a ledger that has forgotten its own settles it from there."""
    return Order.ORDINAL if all(sample.place == sample.ordinal for sample in samples) else Order.ARRIVAL


@dataclass(frozen=True)
class TrainedStep:
    """One step of a checkpoint's lineage, as its manifest records it."""

    step: int
    rev: int
    samples: tuple[TrainedSample, ...]

    @property
    def plan(self) -> StepPlan:
        return StepPlan(self.step, tuple(s.sample_id for s in self.samples), self.rev)


@dataclass(frozen=True)
class CheckpointRecord:
    """A durable checkpoint: the folder's name, and the digest of its manifest.

    `chain` is the lineage's hash up to `step` (see `chain_of`); `first_place` is where a consumer that
    resumes from it begins to read the log.
    """

    step: int
    name: str
    manifest_digest: str
    chain: str = ""
    first_place: int = 0


def chain_of(before: str, plans: Iterable[StepPlan]) -> str:
    """The hash of a lineage: the hash `before`, continued by `plans` in step order."""
    return chain_of_digests(before, (plan.digest for plan in plans))


def chain_of_digests(before: str, digests: Iterable[str]) -> str:
    """The same, from the digests of the plans."""
    chain = before
    for digest in digests:
        chain = hashlib.sha256(f"{chain}{digest}".encode()).hexdigest()
    return chain


@dataclass(frozen=True)
class Usage:
    """Counts and bytes of what occupies the feature store, or is about to.

    resident: committed and not freed; provisional: resident and acked, but in no durable checkpoint;
    waiting: not acked (lost samples included); reserved: intents that no commit and no sweep has ended.
    """

    resident_samples: int = 0
    resident_bytes: int = 0
    provisional_samples: int = 0
    waiting_samples: int = 0
    reserved_samples: int = 0
    reserved_bytes: int = 0

    def has_room(self, budget: Budget, num_samples: int, num_bytes: int) -> bool:
        samples = self.resident_samples + self.reserved_samples + num_samples
        if budget.num_samples is not None and samples > budget.num_samples:
            return False
        return self.resident_bytes + self.reserved_bytes + num_bytes <= budget.num_bytes


@dataclass(frozen=True)
class PromptCounts:
    """The number of prompts in each state; their sum is the number that the ledger knows.

    `again`: pending or leased prompts whose sample was lost.
    """

    pending: int = 0
    leased: int = 0
    done: int = 0
    failed: int = 0
    again: int = 0

    @property
    def known(self) -> int:
        return self.pending + self.leased + self.done + self.failed

    @property
    def open(self) -> int:
        """Pending or being captured."""
        return self.pending + self.leased


@dataclass(frozen=True)
class Snapshot:
    """The counters of a ledger at one moment; reading them costs the same however long the run is."""

    lsn: int
    order: Order | None
    prompts: PromptCounts
    committed: int  # samples, ever
    settled: int  # see `Page`
    closed: bool
    usage: Usage
    lost: int
    quarantined: int
    trained_step: int  # the last step acked since the head, or the head's own
    checkpoints: tuple[CheckpointRecord, ...]  # retained, oldest first; the last one is the head
    epochs: Mapping[str, int]  # by role: how often it was acquired
    facts: Mapping[str, Any]
    next_generation: int
    archived_place: int = 0  # samples below it have no rows, unless they were quarantined

    @property
    def head(self) -> CheckpointRecord | None:
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def samples_trained(self) -> int:
        """Acked, durably or not."""
        return self.committed - self.usage.waiting_samples - self.quarantined

    @property
    def restarts(self) -> int:
        return sum(epoch - 1 for epoch in self.epochs.values())


@dataclass(frozen=True)
class Ownership:
    """Which bytes in a feature store belong to a sample or to a worker, at one moment.

    A generation below `next_generation` that is neither in `present` nor in `promised` has no owner and
    never gets one; a later generation may have one by now.
    """

    present: Mapping[str, int]  # sample id to generation
    promised: Mapping[int, str]  # generation of a live intent to sample id
    revoked: Mapping[int, str]  # of a revoked one, whose bytes may still exist
    next_generation: int

    @property
    def generations(self) -> set[int]:
        return {*self.present.values(), *self.promised}


def compacted(ref: SampleRef) -> SampleRef:
    """The ref without the fields that only a reader of its (freed) features needs."""
    return replace(ref, feature_keys={}, feature_specs={}, metadata={})


def bare_ref(sample_id: str, ordinal: int | None) -> SampleRef:
    """What remains of the ref of an archived or a forgotten sample."""
    return SampleRef(sample_id, "", None, "", {}, {}, "", ordinal=ordinal)
