"""The product's way to bring samples from one process to another, and two others to compare it with.

`Durable` is the product: feature store plus ledger. `PlainCopy` is the least any copying transport can
do, and `Prototype` that plus the simplest ledger and a digest. Every one (and those of
usual_transports.py) starts with the tensors of a finished capture and ends with all bytes read in the
consumer; where its tensors lie in memory that must be given back, that includes a copy out.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
import xxhash

from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import CheckpointRecord, SourceBlock, StepPlan, Wanted, chain_of
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.types import SampleRef

FORK = multiprocessing.get_context("fork")
GROUPS = 8  # Resident at most.
GROUPS_OF_A_CHECKPOINT = 4
WAIT_S = 1.0

Tensors = Mapping[str, torch.Tensor]


def sample(num_bytes: int) -> dict[str, torch.Tensor]:
    """Features of a capture: three quarters auxiliary states, one quarter last states; bf16."""
    tokens = num_bytes // (2 * 4 * 512)
    return {
        "input_ids": torch.zeros(tokens, dtype=torch.int32),
        "loss_mask": torch.ones(tokens, dtype=torch.uint8),
        "aux_hidden_states": torch.randn(tokens, 3 * 512).to(torch.bfloat16),
        "last_hidden_states": torch.randn(tokens, 512).to(torch.bfloat16),
    }


def payload_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class Transport:
    """`disk` is on a filesystem that keeps what is synced, `memory` in shared memory."""

    name: ClassVar[str]
    moved_bytes: ClassVar[int] = 2 << 30  # in a round: a third of a second, without the warm-up

    def __init__(self, disk: Path, memory: Path, tensors: Tensors, count: int, group: int) -> None:
        self.disk, self.memory, self.tensors, self.count, self.group = disk, memory, tensors, count, group
        self.num_bytes = payload_bytes(tensors)
        self.credit = FORK.Semaphore(GROUPS * group)
        self.filled = FORK.Semaphore(0)
        self.prepare()

    def prepare(self) -> None:
        """In the parent, before the two processes are forked."""

    def produce(self) -> None:
        raise NotImplementedError

    def consume(self) -> Iterator[None]:
        """One item for each sample whose bytes have been read."""
        raise NotImplementedError

    def close(self) -> None:
        """In the parent, after both have ended."""


class PlainCopy(Transport):
    """Mapped before the fork, so each process faults each page once, in the warm-up."""

    name = "plain copy"

    def prepare(self) -> None:
        size = sum(-(-tensor.nbytes // 64) * 64 for tensor in self.tensors.values())
        self.slots = [
            torch.zeros(size, dtype=torch.uint8).share_memory_() for _ in range(GROUPS * self.group)
        ]
        self.landing = [torch.zeros(size, dtype=torch.uint8) for _ in range(self.group)]

    def produce(self) -> None:
        for number in range(self.count):
            self.credit.acquire()
            self.write(self.slots[number % len(self.slots)])
            self.filled.release()

    def write(self, slot: torch.Tensor) -> None:
        offset = 0
        for tensor in self.tensors.values():
            slot[offset : offset + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
            offset += -(-tensor.nbytes // 64) * 64

    def consume(self) -> Iterator[None]:
        for number in range(self.count):
            self.filled.acquire()
            self.landing[number % self.group].copy_(self.slots[number % len(self.slots)])
            self.credit.release()
            yield


class Prototype(PlainCopy):
    """One SQLite table (WAL, NORMAL), a transaction a group to commit, lease and ack; xxh3 on both sides."""

    name = "prototype"

    def prepare(self) -> None:
        super().prepare()
        with self.open() as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("CREATE TABLE ref (id INTEGER PRIMARY KEY, state TEXT, digest BLOB, meta TEXT)")
        db.close()

    def open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.disk / "prototype.db", timeout=60, isolation_level="IMMEDIATE")
        db.execute("PRAGMA synchronous=NORMAL")
        return db

    def produce(self) -> None:
        db, meta = self.open(), "x" * 250
        for first in range(0, self.count, self.group):
            rows = []
            for number in range(first, first + self.group):
                self.credit.acquire()
                slot = self.slots[number % len(self.slots)]
                self.write(slot)
                rows.append((number, "committed", xxhash.xxh3_64_digest(slot.numpy().data), meta))
            with db:
                db.executemany("INSERT INTO ref VALUES (?, ?, ?, ?)", rows)
            for _ in rows:
                self.filled.release()
        db.close()

    def consume(self) -> Iterator[None]:
        db = self.open()
        for first in range(0, self.count, self.group):
            for _ in range(self.group):
                self.filled.acquire()
            numbers = (first, first + self.group - 1)
            with db:
                db.execute("UPDATE ref SET state = 'leased' WHERE id BETWEEN ? AND ?", numbers)
            rows = db.execute("SELECT id, digest FROM ref WHERE id BETWEEN ? AND ?", numbers).fetchall()
            for number, digest in rows:
                copy = self.slots[number % len(self.slots)].clone()
                assert xxhash.xxh3_64_digest(copy.numpy().data) == digest
                yield
            with db:
                db.execute("UPDATE ref SET state = 'acked' WHERE id BETWEEN ? AND ?", numbers)
            for _ in rows:
                self.credit.release()
        db.close()


class Durable(Transport):
    """Every step's ledger calls as producer and consumer make them, with the ledger in `durability="head"`.

    A step has a group's samples; every fourth is a checkpoint (fsync), and then its samples are freed.
    """

    name = "paceline"

    def prepare(self) -> None:
        ledger = self.ledger()
        ledger.extend(None, [SourceBlock(0, self.count, "0" * 16)])
        ledger.close()
        # As many slots as are ever in use, and free: they are taken in turn, so the warm-up meets each once.
        features, made = self.features(owner=True), [f"made:{n}" for n in range(GROUPS * self.group)]
        for name in made:
            features.put(name, self.tensors)
        for name in made:
            features.free([(name, 0)])
        features.close()

    def ledger(self) -> SQLiteLedger:
        return SQLiteLedger(self.disk / "ledger.db", durability="head")

    def features(self, owner: bool) -> SharedMemoryFeatureStore:
        return SharedMemoryFeatureStore(self.memory / "features", budget_bytes=8 << 30, owner=owner)

    def produce(self) -> None:
        session, features = ProducerSession(self.ledger(), "benchmark"), self.features(owner=True)
        session.acquire()
        while True:
            while True:
                seen = session.lsn()
                if features.usage().resident_samples <= (GROUPS - 1) * self.group:
                    break
                session.wait(seen, WAIT_S)
            leases = session.lease(self.group)
            if not leases:
                return
            wanted = [Wanted(x.ordinal, f"benchmark:{x.ordinal}", self.num_bytes) for x in leases]
            generations = session.reserve(wanted)
            assert generations is not None, "there is no budget"
            session.commit([self.put(features, w, g) for w, g in zip(wanted, generations, strict=True)])

    def put(self, features: SharedMemoryFeatureStore, wanted: Wanted, generation: int) -> SampleRef:
        sealed = features.put(wanted.sample_id, self.tensors, generation=generation)
        return SampleRef(
            sample_id=wanted.sample_id,
            run_id="benchmark",
            source_task_id=str(wanted.ordinal),
            feature_store_uri=sealed.uri,
            feature_keys=sealed.keys,
            feature_specs=sealed.specs,
            strategy="eagle3",
            num_tokens=len(self.tensors["input_ids"]),
            estimated_bytes=sealed.num_bytes,
            metadata={"digest": sealed.digest},
            generation=generation,
            ordinal=wanted.ordinal,
        )

    def consume(self) -> Iterator[None]:
        session, features = ConsumerSession(self.ledger(), "benchmark"), self.features(owner=False)
        session.acquire()
        place, chain = 0, ""
        for step in itertools.count(1):
            while True:
                seen = session.lsn()
                entries = session.read(place, place + self.group).entries
                if len(entries) == self.group:
                    break
                session.wait(seen, WAIT_S)
            place += self.group
            plan = StepPlan(step, tuple(entry.sample_id for entry in entries))
            session.plan(plan)
            samples = []
            for entry in entries:
                samples.append(features.get(entry.ref))
                yield
            session.ack(step, 0, plan.sample_ids)
            chain = chain_of(chain, [plan])
            if step % GROUPS_OF_A_CHECKPOINT == 0:
                session.write_ack()
                session.head(CheckpointRecord(step, f"step-{step}", "0" * 64, chain, place))
                session.release(features)
            if place == self.count:
                return

    def close(self) -> None:
        self.features(owner=False).destroy()
