"""A run made by single calls of the sessions, with checkpoints of a few bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.records import CheckpointRecord, SourceBlock, TrainedSample, TrainedStep, chain_of
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.ledger_calls import RUN_ID, consumer_of, producer_of, refs_of
from paceline.training.checkpoint import Checkpoint, CheckpointFolder


class Nothing:
    """A feature store without bytes."""

    def free(self, written: object) -> None:
        """Nothing is there."""


class RunByHand:
    """`capture`, `train` and `checkpoint` do in a few calls what the roles do, and nothing else."""

    def __init__(self, folder: Path, prompts: int = 12) -> None:
        """A run that goes on in `folder`, or begins there with so many prompts."""
        self.folder = folder
        self.checkpoints = CheckpointFolder(folder / "checkpoints", RUN_ID)
        self.since_head: list[TrainedStep] = []
        self.weights = b"weights" * 50
        self.names: tuple[str, ...] = ("weights.bin",)  # of the files that hold them
        self._prompts = prompts
        self.open()
        if "config" not in self.ledger.facts():
            self.ledger.set_facts(None, {"config": {"training.passes": 1}})

    def open(self) -> None:
        """Take both roles, as after a restart."""
        self.ledger = SQLiteLedger(self.folder / "ledger.db", durability="head")
        self.ledger.archive_from = 1
        known = self.ledger.source_blocks()
        self.producer = producer_of(self.ledger, prompts=known[0].count if known else self._prompts)
        self.consumer: ConsumerSession = consumer_of(self.ledger)

    def extend(self, count: int) -> None:
        known = self.ledger.snapshot().prompts.known
        self.producer.extend([SourceBlock(known, count, f"{count} more from {known}")])

    def capture(self, count: int) -> list[str]:
        """The next prompts, or those to be captured again; the ids of their samples."""
        numbers = [lease.ordinal for lease in self.producer.lease(count)]
        refs = refs_of(self.producer, *numbers)
        assert self.producer.commit(refs) == refs
        assert len(refs) == count
        return [ref.sample_id for ref in refs]

    def begin(self, sample_ids: Sequence[str], rev: int = 0) -> TrainedStep:
        """Plan and begin the next step."""
        records = self.ledger.find(sample_ids)
        samples = tuple(
            TrainedSample(records[i].place, i, records[i].ref.ordinal, True)
            for i in sample_ids
            if i in records
        )
        trained = TrainedStep(self.ledger.snapshot().trained_step + 1, rev, samples)
        self.consumer.plan(trained.plan)
        return trained

    def train(self, sample_ids: Sequence[str], rev: int = 0) -> None:
        """Begin and ack the next step; every sample is visited once."""
        trained = self.begin(sample_ids, rev)
        self.consumer.ack(trained.step, rev, [s.sample_id for s in trained.samples])
        self.consumer.write_ack()
        self.since_head.append(trained)

    def write_checkpoint(self) -> tuple[CheckpointRecord, list[TrainedStep]]:
        """The folder alone, as a crash before the ledger's record leaves it; and its lineage."""
        now = self.ledger.snapshot()
        chain = chain_of(now.head.chain if now.head else "", [trained.plan for trained in self.since_head])
        places = [s.place for trained in self.since_head for s in trained.samples]
        written = Checkpoint(
            now.trained_step,
            max(places, default=-1) + 1,
            dict.fromkeys(self.names, self.weights),
            {},
            tuple(self.since_head),
            now.head.name if now.head else "",
            chain,
            self.consumer.epoch,
            now.lsn,
        )
        lineage, self.since_head = self.since_head, []
        return self.checkpoints.write(written), lineage

    def checkpoint(self, keep: int = 2) -> None:
        """Commit, free what is covered, retire and archive."""
        record, _ = self.write_checkpoint()
        self.consumer.head(record)
        self.consumer.release(Nothing())
        self.consumer.retire(keep)
        self.checkpoints.sweep({record.name for record in self.consumer.checkpoints()})
