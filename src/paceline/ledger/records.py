"""What the control plane hands in and out: plain records, and the hash of a lineage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from paceline.types import SampleRef


@dataclass(frozen=True)
class Fence:
    """The right to write as `role`, until another process acquires the role.

    `generation`: the first that this epoch may reserve; every intent below it was committed or revoked
    before, so bytes below it that the ledger does not name are nobody's.
    """

    role: str
    epoch: int
    generation: int = 0


@dataclass(frozen=True)
class CommittedRef:
    """A committed ref at its place in the stream.

    `present` is False while its features are lost. Of a sample whose history was folded away the ref
    keeps nothing but its ids.
    """

    seq: int
    ref: SampleRef
    present: bool = True
    quarantined: bool = False


@dataclass(frozen=True)
class SampleRecord:
    """What the ledger knows of one sample. `state`: present, lost, released or quarantined.

    `step` is that of its ack (its last visit), or that in whose plan it was quarantined.
    """

    sample_id: str
    seq: int
    state: str
    task_id: str | None
    step: int | None
    durable: bool
    reason: str = ""


@dataclass(frozen=True)
class TaskLease:
    """The right to capture one prompt; `ordinal` is its place in the run's prompt order.

    `attempt` counts failures; `deaths` counts processes that died while they held the lease.
    """

    task_id: str
    ordinal: int
    attempt: int
    deaths: int = 0


@dataclass(frozen=True)
class Intent:
    """The right to write `num_bytes` of one sample under `generation`, a number never used twice."""

    generation: int
    sample_id: str
    num_bytes: int


@dataclass(frozen=True)
class StepPlan:
    """The samples of one optimizer step, in order: written before the step, replayed exactly.

    `rev` grows when a planned sample turns out to be one that cannot be trained.
    """

    step: int
    sample_ids: tuple[str, ...]
    last_seq: int
    rev: int = 0

    @property
    def digest(self) -> str:
        head = str(self.step) if self.rev == 0 else f"{self.step}.{self.rev}"
        return hashlib.sha256("\n".join((head, *self.sample_ids)).encode()).hexdigest()


@dataclass(frozen=True)
class StepAck:
    """The weights in memory contain `step` as revision `rev` of its plan has it.

    `finished` are the samples that were visited for the last time.
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

    seq: int
    sample_id: str
    task_id: str | None
    finished: bool


@dataclass(frozen=True)
class TrainedStep:
    """One step of a checkpoint's lineage, as its manifest keeps it."""

    step: int
    rev: int
    last_seq: int
    samples: tuple[TrainedSample, ...]

    @property
    def plan(self) -> StepPlan:
        return StepPlan(self.step, tuple(s.sample_id for s in self.samples), self.last_seq, self.rev)


@dataclass(frozen=True)
class CheckpointRecord:
    """A durable checkpoint: the folder's name, and the digest of its manifest.

    `chain` is the lineage's hash up to `step` (see `chain_of`); "" if its writer keeps none.
    """

    step: int
    name: str
    manifest_digest: str
    last_seq: int
    chain: str = ""


def chain_of(before: str, plans: Iterable[StepPlan]) -> str:
    """The hash of a lineage: that of the lineage `before`, continued by `plans` in step order."""
    chain = before
    for plan in plans:
        chain = hashlib.sha256(f"{chain}{plan.digest}".encode()).hexdigest()
    return chain


@dataclass(frozen=True)
class LedgerUsage:
    """Counts and bytes of what occupies the feature store, or is about to.

    resident: committed and not freed; provisional: resident and acked, but by no durable checkpoint;
    waiting: not acked at all (lost ones included); reserved: byte intents that no commit ended yet.
    """

    resident_samples: int
    resident_bytes: int
    provisional_samples: int
    provisional_bytes: int
    waiting_samples: int
    reserved_samples: int = 0
    reserved_bytes: int = 0


def compacted(ref: SampleRef) -> SampleRef:
    """The ref without what only a reader of its (freed) features would need."""
    return replace(ref, feature_keys={}, feature_specs={}, metadata={})
