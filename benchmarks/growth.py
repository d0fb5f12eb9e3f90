"""What a ledger costs as a run grows, and as more processes write to it: curves, not points.

    python -m benchmarks.growth [--quick]

Drives the ledger as producer and consumer do (make prompts known, lease, reserve, commit, plan, ack,
checkpoint, release, compact), without engines, features or models. The cycle of a group and the restart
must not grow with history, and the size by a few bytes a sample at most; each is measured on the way and
compared with the figure at 10,000 refs: before, nothing is archived yet. A source without an end makes the
prompts known, one block a group. What a ledger costs that knows so many prompts from the start, in blocks
of 1,024, is measured by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter

from benchmarks.control_plane import know_prompts
from benchmarks.ledger_workers import RUN, commit_leased, produce
from benchmarks.rows import Row, row
from benchmarks.together import rate, together
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import CheckpointRecord, SourceBlock, StepPlan, chain_of
from paceline.ledger.stores.sqlite import SQLiteLedger

GROUP = 1024
BATCH = 8
POINTS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
STEADY = 10_000  # from here on every figure is to stay
PRODUCERS = (1, 4, 16)
GROUPS_OF_A_POINT = 8  # the cycle is the median over the last so many


class NoFeatures:
    def free(self, written: Iterable[tuple[str, int]]) -> None:
        """There are none."""


def block(first: int, count: int = GROUP) -> SourceBlock:
    return SourceBlock(first, count, hashlib.sha256(str(first).encode()).hexdigest()[:16])


class Run:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.step, self.chain = 0, ""
        self.open()

    def open(self) -> None:
        self.ledger = SQLiteLedger(self.path, durability="head")
        self.producer, self.consumer = ProducerSession(self.ledger, RUN), ConsumerSession(self.ledger, RUN)
        self.producer.acquire()
        self.consumer.acquire()

    def group(self) -> None:
        """One group from prompts to durable weights."""
        known = self.ledger.snapshot().prompts.known
        self.producer.extend([block(known)])
        leases = self.producer.lease(GROUP, GROUP)
        commit_leased(self.producer, leases)
        for start in range(known, known + GROUP, BATCH):
            entries = self.consumer.read(start, start + BATCH).entries
            self.step += 1
            plan = StepPlan(self.step, tuple(entry.sample_id for entry in entries))
            self.consumer.plan(plan)
            self.consumer.ack(self.step, 0, plan.sample_ids)
            self.chain = chain_of(self.chain, [plan])
        self._checkpoint(known + GROUP)

    def _checkpoint(self, place: int) -> None:
        consumer = self.consumer
        consumer.write_ack()
        consumer.head(CheckpointRecord(self.step, f"step-{self.step}", "0" * 64, self.chain, place))
        consumer.release(NoFeatures())
        consumer.retire(2)

    def restart_ms(self) -> float:
        """Close, open again, and ask what both roles ask of the ledger when they start."""
        self.ledger.close()
        started = perf_counter()
        self.open()
        producer, consumer = self.producer, self.consumer
        producer.ownership(), producer.revoked(), producer.lost(), producer.failed(0, GROUP)
        place = producer.snapshot().settled
        consumer.facts(), consumer.checkpoints(), consumer.step_plan(self.step + 1)
        consumer.release(NoFeatures()), consumer.read(place - 64, place)
        return 1e3 * (perf_counter() - started)


def curve(path: Path, points: list[int]) -> Iterator[tuple[int, float, float, float]]:
    """(samples, ms of a group's whole cycle, ms of a restart, bytes of the file for each sample)."""
    run = Run(path)
    took: list[float] = []
    for point in points:
        while run.ledger.snapshot().committed < point:
            started = perf_counter()
            run.group()
            took.append(1e3 * (perf_counter() - started))
        restart = min(run.restart_ms() for _ in range(3))  # also empties the write-ahead log
        size = path.stat().st_size / run.ledger.snapshot().committed
        yield point, statistics.median(took[-GROUPS_OF_A_POINT:]), restart, size
    run.ledger.close()


def history(path: Path, points: list[int]) -> list[Row]:
    rows: list[Row] = []
    steady: tuple[float, float] | None = None
    for samples, cycle, restart, size in curve(path, points):
        at = f"at {samples:,} refs"
        if samples == STEADY:
            steady = (cycle, restart)
        for n, (what, value) in enumerate((("cycle of 1,024 refs", cycle), ("restart", restart))):
            more = (
                {"limit": steady[n], "limit_name": f"at {STEADY:,} refs", "ratio": steady[n] / value}
                if steady
                else {}
            )
            goal = 0.8 if steady else None
            rows.append(row(f"{what} {at}", value, "ms", goal=goal, curve=what, x=samples, **more))
        rows.append(row(f"ledger size {at}", size, "B/ref", curve="ledger size", x=samples))
    return rows


def known_prompts(folder: Path, points: list[int]) -> list[Row]:
    """Of ledgers that know so many prompts and nothing else: the check at a restart, and the size."""
    rows: list[Row] = []
    for count in points:
        path = folder / f"known-{count}.db"
        blocks = [block(first, min(GROUP, count - first)) for first in range(0, count, GROUP)]
        session = ProducerSession(SQLiteLedger(path, durability="head"), RUN)
        session.acquire()
        session.extend(blocks)
        session.ledger.close()
        started = perf_counter()
        session = ProducerSession(SQLiteLedger(path, durability="head"), RUN)
        session.acquire()
        assert session.extend(blocks) == 0, "all are known"
        took = 1e3 * (perf_counter() - started)
        session.ledger.close()
        at = f"at {count:,} prompts known"
        more = {"curve": "restart that checks the prompts", "x": count}
        rows.append(row(f"restart {at}, each digest checked", took, "ms", **more))
        rows.append(row(f"ledger size {at}", path.stat().st_size / count, "B/prompt"))
    return rows


def producers(folder: Path, seconds: float, repeats: int) -> list[Row]:
    """Committed refs per second of all producers together, each a worker with a role of its own."""
    totals: dict[int, list[float]] = {number: [] for number in PRODUCERS}
    for repeat in range(repeats):
        for number in PRODUCERS:
            options = {"path": str(folder / f"{repeat}-{number}.db"), "batch": 32, "seconds": seconds}
            know_prompts(options["path"], int(60_000 * seconds))
            totals[number].append(
                rate(together(*[(produce, {**options, "worker": f"w{n}"}) for n in range(number)]))
            )
    alone = statistics.median(totals[PRODUCERS[0]])
    return [
        row(
            f"lease, reserve, commit: {number} producer" + "s" * (number > 1),
            statistics.median(totals[number]),
            "refs/s",
            limit=alone,
            limit_name="1 producer",
            ratio=statistics.median(a / b for a, b in zip(totals[number], totals[PRODUCERS[0]], strict=True)),
            goal=0.8,
            curve="committed by 1, 4, 16 producers",
            x=number,
        )
        for number in PRODUCERS
    ]


def run(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as folder:
        points = [point for point in POINTS if point <= (100_000 if quick else POINTS[-1])]
        rows = history(Path(folder) / "history.db", points) + known_prompts(Path(folder), points)
        return rows + producers(Path(folder), 1.0 if quick else 4.0, 3 if quick else 5)


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
