"""A run made by hand, call by call of the store, with checkpoints of a few bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from paceline.ledger.records import CheckpointRecord, StepAck, TrainedSample, TrainedStep, chain_of
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.testing.samples import sample_ref
from paceline.training.checkpoint import Checkpoint, CheckpointFolder


class RunByHand:
    """`capture`, `train` and `checkpoint` do in a few calls what the roles do, and nothing else."""

    def __init__(self, folder: Path, prompts: int = 12) -> None:
        """A run that goes on in `folder`, or begins there with so many prompts."""
        self.folder = folder
        self.checkpoints = CheckpointFolder(folder / "checkpoints", "run0")
        self.since_head: list[TrainedStep] = []
        self.open()
        if not self.store.facts():
            self.store.set_facts({"run_id": "run0", "config": {"training.passes": 1}})
            self.store.add_tasks([f"task-{n}" for n in range(prompts)], fence=self.producer)

    def open(self) -> None:
        """Take both roles, as after a restart."""
        self.store = SQLiteMetadataStore(self.folder / "ledger.db", durability="head")
        self.store.fold_from = 1
        self.producer = self.store.acquire_role("producer", "test")
        self.consumer = self.store.acquire_role("consumer", "test")

    def capture(self, count: int) -> list[str]:
        """The next prompts, or those to be captured again; the ids of their samples."""
        numbers = [lease.ordinal for lease in self.store.lease_tasks("w", count, fence=self.producer)]
        refs = [sample_ref(number) for number in numbers]
        generations = self.store.reserve({r.sample_id: r.estimated_bytes for r in refs}, fence=self.producer)
        refs = [replace(ref, generation=generations[ref.sample_id]) for ref in refs]
        assert self.store.commit_samples(refs, fence=self.producer) == [True] * count
        return [ref.sample_id for ref in refs]

    def begin(self, sample_ids: Sequence[str], rev: int = 0) -> TrainedStep:
        """Plan and begin the next step."""
        records = [self.store.sample_record(sample_id) for sample_id in sample_ids]
        samples = tuple(TrainedSample(r.seq, r.sample_id, r.task_id, True) for r in records if r is not None)
        step = self.store.trained_step() + 1
        trained = TrainedStep(step, rev, max((s.seq for s in samples), default=0), samples)
        self.store.begin_step(trained.plan, fence=self.consumer)
        return trained

    def train(self, sample_ids: Sequence[str], rev: int = 0) -> None:
        """Begin and ack the next step; every sample is visited once."""
        trained = self.begin(sample_ids, rev)
        finished = tuple(s.sample_id for s in trained.samples)
        self.store.ack_step(StepAck(trained.step, rev, finished), fence=self.consumer)
        self.since_head.append(trained)

    def write_checkpoint(self) -> tuple[CheckpointRecord, list[TrainedStep]]:
        """The folder alone, as a crash before the ledger's record leaves it; and its lineage."""
        heads = self.store.checkpoints()
        chain = chain_of(heads[-1].chain if heads else "", [trained.plan for trained in self.since_head])
        last = max((trained.last_seq for trained in self.since_head), default=0)
        written = Checkpoint(
            self.store.trained_step(),
            last,
            {"weights.bin": b"weights" * 50},
            {},
            tuple(self.since_head),
            heads[-1].name if heads else "",
            chain,
            self.consumer.epoch,
            self.store.lsn(),
        )
        lineage, self.since_head = self.since_head, []
        return self.checkpoints.write(written), lineage

    def checkpoint(self, keep: int = 2) -> None:
        """Commit, free what is covered, retire and fold."""
        record, _ = self.write_checkpoint()
        self.store.record_checkpoint(record, fence=self.consumer)
        self.store.record_released(self.store.releasable(99), fence=self.consumer)
        for old in self.store.checkpoints()[:-keep]:
            self.store.forget_checkpoint(old.step, fence=self.consumer)
        self.store.compact(fence=self.consumer)
        self.checkpoints.sweep({record.name for record in self.store.checkpoints()})
