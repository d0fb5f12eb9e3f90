"""A consumer that does with checkpoints what the trainer does, in its order: write, record, retire, sweep.

The ledger is a journal of calls on the specification, each durable when it returns.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paceline.ledger.records import (
    CONSUMER,
    CheckpointRecord,
    Fence,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
    chain_of,
)
from paceline.testing.samples import sample_ref
from paceline.testing.specification_of_steps import SpecificationLedger
from paceline.training.checkpoint import Checkpoint, CheckpointFolder
from paceline.training.recovery import find_checkpoint

KEPT = 2
RUN = "run0"


@dataclass(frozen=True)
class Promise:
    """What the program may count on: the ledger after `calls` calls, and these folders, whole."""

    calls: int
    whole: frozenset[CheckpointRecord]


@dataclass
class Journal:
    """A ledger whose calls are noted, so that it can be had again as it was after any of them."""

    ledger: SpecificationLedger = field(default_factory=SpecificationLedger)
    calls: list[Callable[[SpecificationLedger], Any]] = field(default_factory=list)

    def do(self, call: Callable[[SpecificationLedger], Any]) -> Any:
        result = call(self.ledger)
        self.calls.append(call)
        return result

    def as_of(self, calls: int) -> Journal:
        then = Journal()
        for call in self.calls[:calls]:
            then.do(call)
        return then


class Noted:
    """The part of a session that `find_checkpoint` uses; its changes go through the consumer's journal."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._fence = consumer.fence
        self.epoch = consumer.fence.epoch
        ledger = consumer.journal.ledger
        self.lsn, self.facts = ledger.lsn, ledger.facts

    def checkpoints(self) -> tuple[CheckpointRecord, ...]:
        return self._consumer.records()

    def refuse_if_replaced(self) -> None:
        """One consumer follows the other here."""

    def set_facts(self, facts: dict[str, Any]) -> None:
        self._consumer.do(lambda ledger: ledger.set_facts(self._fence, facts))

    def adopt(self, record: CheckpointRecord, lineage: Any) -> None:
        self._consumer.do(lambda ledger: ledger.head(self._fence, record, lineage))

    def fall_back(self, step: int) -> list[str]:
        lost: list[str] = self._consumer.do(lambda ledger: ledger.fall_back(self._fence, step))
        return lost


@dataclass
class Consumer:
    """One consumer after another on the same folder. `attempted` and `written` outlive them."""

    place: Path
    journal: Journal
    rng: random.Random
    promise: Callable[[Promise], None] = lambda _: None
    attempted: list[Checkpoint] = field(default_factory=list)  # before any of their bytes are on the disk
    written: dict[CheckpointRecord, Checkpoint] = field(default_factory=dict)
    whole: set[CheckpointRecord] = field(default_factory=set)  # `write` returned, not damaged since
    reports: list[str] = field(default_factory=list)
    head: CheckpointRecord | None = None

    def start(self) -> None:
        """Take over as the trainer does: recover, then sweep."""
        self.fence: Fence = self.do(lambda ledger: ledger.acquire(CONSUMER, "c"))
        self.folder = CheckpointFolder(self.place, RUN)
        report = lambda event, **_: self.reports.append(event)  # noqa: E731
        found = find_checkpoint(Noted(self), self.folder, self.fence.epoch - 1, report)  # type: ignore[arg-type]
        self.head = None
        if found is not None:
            self.head, on_disk = found
            checkpoint = replace(on_disk, files=dict(on_disk.files))  # to be compared with other images
            assert checkpoint in self.attempted, f"{self.head.name} holds what nobody wrote"
            self.written[self.head] = checkpoint
        self._sweep()

    def do(self, call: Callable[[SpecificationLedger], Any]) -> Any:
        result = self.journal.do(call)
        self._promise()
        return result

    def records(self) -> tuple[CheckpointRecord, ...]:
        return self.journal.ledger.snapshot().checkpoints

    def _promise(self) -> None:
        self.promise(Promise(len(self.journal.calls), frozenset(self.whole)))

    def train(self) -> Checkpoint:
        """A step or two (none before the first checkpoint); what is to be saved then."""
        rng, head = self.rng, self.head
        last = head.step + rng.randint(1, 2) if head else 0
        lineage = tuple(self._step(step) for step in range(head.step + 1 if head else 1, last + 1))
        return Checkpoint(
            step=last,
            first_place=0,
            files={
                "draft.safetensors": rng.randbytes(rng.randint(4500, 9000)),
                "optimizer.safetensors": rng.randbytes(rng.randint(1, 1500)),
                "empty.bin": b"",
            },
            values={"position": [0, rng.randrange(100)]},
            lineage=lineage,
            previous=head.name if head else "",
            chain=chain_of(head.chain if head else "", [trained.plan for trained in lineage]),
            epoch=self.fence.epoch,
            lsn=self.journal.ledger.lsn(),
        )

    def _step(self, step: int) -> TrainedStep:
        """Commit two samples, plan them, ack them: the same ones whoever gets to this step."""
        refs = [sample_ref(2 * step), sample_ref(2 * step + 1)]
        self.do(lambda ledger: ledger.commit(None, refs))
        places = {e.sample_id: e.place for e in self.journal.ledger.read(0, 10_000).entries}
        plan = StepPlan(step, tuple(ref.sample_id for ref in refs))
        fence = self.fence
        self.do(lambda ledger: ledger.plan(fence, plan))
        self.do(lambda ledger: ledger.plan(fence, None, StepAck(step, 0, plan.sample_ids)))
        samples = [TrainedSample(places[i], i, None, True) for i in plan.sample_ids]
        return TrainedStep(step, 0, tuple(samples))

    def save(self, checkpoint: Checkpoint) -> None:
        self.attempted.append(checkpoint)
        record = self.folder.write(checkpoint)
        self.written[record] = checkpoint
        self.whole.add(record)
        self._promise()
        fence = self.fence
        self.do(lambda ledger: ledger.head(fence, record))
        self.head = record

    def retire(self) -> None:
        self.whole -= set(self.records()[:-KEPT])
        fence = self.fence
        self.do(lambda ledger: ledger.retire(fence, KEPT))
        self._sweep()

    def _sweep(self) -> None:
        records = self.records()
        self.whole &= set(records)
        self._promise()
        self.folder.sweep({record.name for record in records}, epoch=self.fence.epoch)

    def check(self) -> None:
        """Every record reads back bit for bit, and what no record names is whole or not offered."""
        records = self.records()
        for record in {*records, *self.whole}:
            assert self.folder.read(record) == self.written[record], f"{record.name} reads otherwise"
        for record, checkpoint in self.folder.unrecorded(records):
            assert checkpoint in self.attempted, f"{record.name} holds what nobody wrote"
            assert self.folder.read(record) == checkpoint, f"{record} is not its record"
            assert (record.step, record.first_place) == (checkpoint.step, checkpoint.first_place)
            assert record.chain == checkpoint.chain

    def check_swept(self) -> None:
        names = {record.name for record in self.records()}
        assert {path.name for path in self.place.iterdir()} == names
