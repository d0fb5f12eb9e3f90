"""What a ledger costs as a run grows, and as more processes write to it: curves, not points.

    python -m benchmarks.growth [--quick]

Drives the ledger as producer and consumer do (lease, reserve, commit, begin, ack, checkpoint, release,
fold), without engines, features or models. The cycle of a group and the restart must not grow with
history, and the size by a few bytes a sample at most; each is measured on the way and compared with the
figure at 10,000 refs: before, nothing is folded yet. Several producers share one role's fence and differ
in their names.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from benchmarks.control_plane import rate
from benchmarks.ledger_workers import together
from benchmarks.rows import Row, row
from paceline.ledger.records import CheckpointRecord, Fence, StepAck, StepPlan, chain_of
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.testing.samples import sample_ref

GROUP = 1024
BATCH = 8
PROMPTS_OF_A_ROUND = 100_000
POINTS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
STEADY = 10_000  # from here on every figure is to stay
PRODUCERS = (1, 4, 16)
GROUPS_OF_A_POINT = 8  # the cycle is the median over the last so many


def task_ids(count: int) -> list[str]:
    """As a run names them: round/prompt."""
    return [f"{n // PROMPTS_OF_A_ROUND}/alpaca-{n % PROMPTS_OF_A_ROUND:05d}" for n in range(count)]


class Run:
    def __init__(self, path: Path, samples: int) -> None:
        self.path = path
        self.store = SQLiteMetadataStore(path, durability="head")
        self.store.add_tasks(task_ids(samples))
        self.template = sample_ref(0, run_id="smollm2-cpu")
        self.step, self.chain = 0, ""
        self.take_roles()

    def take_roles(self) -> None:
        self.producer: Fence = self.store.acquire_role("producer", "benchmark")
        self.consumer: Fence = self.store.acquire_role("consumer", "benchmark")

    def group(self) -> bool:
        """One group from prompts to durable weights; False when no prompt is left."""
        store = self.store
        leases = store.lease_tasks("w", GROUP, fence=self.producer)
        if not leases:
            return False
        ids = {lease.task_id: f"smollm2-cpu:{lease.task_id}" for lease in leases}
        generations = store.reserve(dict.fromkeys(ids.values(), 100), fence=self.producer)
        refs = [
            replace(self.template, sample_id=i, source_task_id=task, generation=generations[i])
            for task, i in ids.items()
        ]
        store.commit_samples(refs, fence=self.producer)
        last_seq, names, ack = store.committed_count(), list(ids.values()), None
        for start in range(0, len(names), BATCH):
            self.step += 1
            plan = StepPlan(self.step, tuple(names[start : start + BATCH]), last_seq)
            store.begin_step(plan, ack=ack, fence=self.consumer)
            ack = StepAck(self.step, 0, plan.sample_ids)
            self.chain = chain_of(self.chain, [plan])
        if ack is not None:
            store.ack_step(ack, fence=self.consumer)
        self._checkpoint(last_seq)
        return True

    def _checkpoint(self, last_seq: int) -> None:
        store, fence = self.store, self.consumer
        record = CheckpointRecord(self.step, f"step-{self.step}", "0" * 64, last_seq, self.chain)
        store.record_checkpoint(record, fence=fence)
        store.record_released(list(store.begin_release(GROUP, fence=fence)), fence=fence)
        for old in store.checkpoints()[:-2]:
            store.forget_checkpoint(old.step, fence=fence)
        store.compact(fence=fence)

    def restart_ms(self) -> float:
        """Close, open again, and ask what both roles ask of the ledger when they start."""
        self.store.close()
        started = perf_counter()
        store = self.store = SQLiteMetadataStore(self.path, durability="head")
        self.take_roles()
        store.facts(), store.task_counts(), store.checkpoints(), store.present_generations()
        store.usage(), store.lost_ids(), store.quarantined(), store.begin_release(1000)
        store.read_committed(store.committed_count() - 64, 64)
        return 1e3 * (perf_counter() - started)


def curve(path: Path, points: list[int]) -> Iterator[tuple[int, float, float, float]]:
    """(samples, ms of a group's whole cycle, ms of a restart, bytes of the file for each sample)."""
    run = Run(path, points[-1])
    took: list[float] = []
    waiting = list(points)
    while waiting:
        started = perf_counter()
        more = run.group()
        if more:
            took.append(1e3 * (perf_counter() - started))
        if not more or run.store.committed_count() >= waiting[0]:
            restart = min(run.restart_ms() for _ in range(3))  # also empties the write-ahead log
            yield (
                *(waiting.pop(0), statistics.median(took[-GROUPS_OF_A_POINT:]), restart),
                path.stat().st_size / run.store.committed_count(),
            )
    run.store.close()


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


def producers(folder: Path, seconds: float, repeats: int) -> list[Row]:
    """Committed refs per second of all producers together, and how evenly they share."""
    totals: dict[int, list[float]] = {number: [] for number in PRODUCERS}
    shares: dict[int, list[float]] = {number: [] for number in PRODUCERS}
    for repeat in range(repeats):
        for number in PRODUCERS:
            path = folder / f"{repeat}-{number}.db"
            store = SQLiteMetadataStore(path, durability="head")
            store.add_tasks(task_ids(int(60_000 * seconds)))
            epoch = store.acquire_role("producer", "benchmark").epoch
            store.close()
            options = {"path": str(path), "batch": 32, "seconds": seconds, "epoch": epoch}
            counts = together(*[("produce", {**options, "worker": f"w{n}"}) for n in range(number)])
            totals[number].append(rate(counts))
            moved = [one["refs"] / one["seconds"] for one in counts]
            shares[number].append(min(moved) / max(moved))
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
            note=f"smallest share of the largest {statistics.median(shares[number]):.2f}",
            curve="committed by 1, 4, 16 producers",
            x=number,
        )
        for number in PRODUCERS
    ]


def run(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as folder:
        points = [point for point in POINTS if point <= (100_000 if quick else POINTS[-1])]
        rows = history(Path(folder) / "history.db", points)
        return rows + producers(Path(folder), 1.0 if quick else 4.0, 3 if quick else 5)


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
