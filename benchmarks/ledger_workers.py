"""Workers that write to one ledger at full speed, and the hand-written SQLite they are compared with.

A `path` is a file, or a server's URL with the ledger's name behind "#". They load no torch. `Plain` has the
rows and the transactions of the product and nothing else: no fence, no operation number, no refusal, one
table for each kind of row, and the product's queue for writers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Literal

import apsw

from benchmarks.together import Counts, ready, timed
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.gate import WriterGate
from paceline.ledger.ledger import Ledger
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Lease, Order, StepPlan, Wanted
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.samples import sample_ref
from paceline.types import SampleRef, ref_to_json

WAIT_S = 1.0  # a consumer that sees nothing new for so long is done
RUN = "bench"
TEMPLATE = sample_ref(0, run_id=RUN)


def ref_of(task_id: str, generation: int = 0, ordinal: int | None = None) -> SampleRef:
    """Made as the producer makes it: `dataclasses.replace` would take several times as long."""
    return SampleRef(
        sample_id=f"{RUN}:{task_id}",
        run_id=RUN,
        source_task_id=task_id,
        feature_store_uri=TEMPLATE.feature_store_uri,
        feature_keys=TEMPLATE.feature_keys,
        feature_specs=TEMPLATE.feature_specs,
        strategy="eagle3",
        num_tokens=4,
        estimated_bytes=100,
        metadata=TEMPLATE.metadata,
        generation=generation,
        ordinal=ordinal,
    )


def refs_of(worker: str, first: int, number: int) -> list[SampleRef]:
    return [ref_of(f"{worker}-{n}") for n in range(first, first + number)]


def batches(worker: str, size: int) -> Iterator[list[SampleRef]]:
    """Refs that nobody has committed yet, for ever."""
    return (refs_of(worker, first, size) for first in count(0, size))


def opened(path: str, durability: Literal["head", "full"]) -> Ledger:
    url, _, name = path.partition("#")
    if not name:
        return SQLiteLedger(path, durability=durability)
    from paceline.ledger.stores.redis import RedisLedger

    return RedisLedger(url, name, durability=durability)


# -- the product ---------------------------------------------------------------------------


def commit(path: str, batch: int, seconds: float) -> Counts:
    """Commit fresh refs, `batch` in a transaction, each on the disk on return."""
    session = ProducerSession(opened(path, "full"), RUN, order=Order.ARRIVAL)
    session.acquire()
    fresh = batches("w", batch)
    ready()
    return timed(seconds, lambda: len(session.commit(next(fresh))))


def commit_leased(session: ProducerSession, leases: list[Lease]) -> int:
    """Reserve and commit what was leased; how many were new."""
    wanted = [Wanted(lease.ordinal, f"{RUN}:{lease.ordinal}", 100) for lease in leases]
    generations = session.reserve(wanted)
    assert generations is not None, "there is no budget"
    return len(
        session.commit(
            [ref_of(str(w.ordinal), g, w.ordinal) for w, g in zip(wanted, generations, strict=True)]
        )
    )


def produce(path: str, batch: int, seconds: float, worker: str) -> Counts:
    """Lease, reserve, commit: what a producer asks of the ledger."""
    session = ProducerSession(opened(path, "head"), RUN, worker)
    session.acquire()
    ready()
    return timed(seconds, lambda: commit_leased(session, session.lease(batch)))


def consume(path: str, batch: int, seconds: float) -> Counts:
    """Read the log, plan and ack steps of `batch` samples: what a consumer asks of the ledger."""
    session = ConsumerSession(opened(path, "head"), RUN)
    session.acquire()
    ready()
    place = step = 0

    def one() -> int:
        nonlocal place, step
        seen = session.lsn()
        while not (entries := session.read(place, place + batch).entries):
            session.write_ack()
            if session.wait(seen, WAIT_S) == seen:
                return 0
            seen = session.lsn()
        place, step = entries[-1].place + 1, step + 1
        plan = session.plan(StepPlan(step, tuple(entry.sample_id for entry in entries))).plan
        session.ack(step, plan.rev, plan.sample_ids)
        return len(entries)

    return timed(seconds, one)


# -- hand-written --------------------------------------------------------------------------


class Plain:
    """The same rows in as few statements as SQLite allows."""

    def __init__(self, path: str, synchronous: str) -> None:
        self.gate = WriterGate(Path(path + "-gate"))
        self.db = apsw.Connection(path)
        self.db.set_busy_timeout(60_000)
        with self.gate:
            list(
                self.db.execute(  # the cursor runs the later statements
                    f"PRAGMA journal_mode=WAL; PRAGMA synchronous={synchronous};"
                    "CREATE TABLE IF NOT EXISTS sample (seq INTEGER PRIMARY KEY, sample_id TEXT UNIQUE, ref);"
                    "CREATE TABLE IF NOT EXISTS lease (ordinal INTEGER PRIMARY KEY, task_id, holder);"
                    "CREATE TABLE IF NOT EXISTS intent (generation INTEGER PRIMARY KEY, sample_id, n);"
                    "CREATE TABLE IF NOT EXISTS plan (step INTEGER PRIMARY KEY, sample_ids TEXT);"
                    "CREATE TABLE IF NOT EXISTS ack (sample_id TEXT PRIMARY KEY, step INTEGER) WITHOUT ROWID;"
                )
            )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self.gate:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")

    def insert(self, refs: list[SampleRef]) -> None:
        self.db.executemany(
            "INSERT INTO sample (sample_id, ref) VALUES (?, ?)", [(r.sample_id, ref_to_json(r)) for r in refs]
        )


def plain_commit(path: str, batch: int, seconds: float) -> Counts:
    plain = Plain(path, "FULL")
    fresh = batches("w", batch)
    ready()

    def one() -> int:
        refs = next(fresh)
        with plain.transaction():
            plain.insert(refs)
        return batch

    return timed(seconds, one)


def plain_produce(path: str, batch: int, seconds: float, number: int = 0, of: int = 1) -> Counts:
    """The `number`-th of so many producers: each writes groups of its own."""
    plain = Plain(path, "NORMAL")
    ready()
    first = number * batch

    def one() -> int:
        nonlocal first
        numbers = range(first, first + batch)
        with plain.transaction():
            plain.db.executemany("INSERT INTO lease VALUES (?, ?, 'w')", [(n, f"w-{n}") for n in numbers])
        with plain.transaction():
            plain.db.executemany("INSERT INTO intent VALUES (?, ?, 100)", [(n, f"w-{n}") for n in numbers])
        refs = refs_of("w", first, batch)
        with plain.transaction():
            plain.insert(refs)
            for table, key in (("lease", "ordinal"), ("intent", "generation")):
                plain.db.execute(f"DELETE FROM {table} WHERE {key} BETWEEN ? AND ?", (first, numbers[-1]))  # noqa: S608
        first += of * batch
        return batch

    return timed(seconds, one)


def plain_consume(path: str, batch: int, seconds: float) -> Counts:
    plain = Plain(path, "NORMAL")
    ready()
    after = step = 0

    def one() -> int:
        nonlocal after, step
        waited = time.perf_counter()
        new = "SELECT seq, ref FROM sample WHERE seq > ? LIMIT ?"
        while not (rows := list(plain.db.execute(new, (after, batch)))):
            if time.perf_counter() - waited > WAIT_S:
                return 0
            os.sched_yield()
        after, step = rows[-1][0], step + 1
        ids = [json.loads(ref)["sample_id"] for _, ref in rows]
        with plain.transaction():
            plain.db.execute("INSERT INTO plan VALUES (?, ?)", (step, json.dumps(ids)))
        with plain.transaction():
            plain.db.executemany("INSERT INTO ack VALUES (?, ?)", [(i, step) for i in ids])
        return len(ids)

    return timed(seconds, one)
