"""The ledger against hand-written SQLite, in processes of their own.

    python -m benchmarks.control_plane [--quick]

Every ratio is the median over rounds; in a round the value and its limit are measured one after the
other, because disks differ by a hundred and one disk by ten within a minute. PACELINE_BENCH_DIR names the
disk (default: the directory for temporary files). Refs are those a run commits, about 450 bytes of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

from benchmarks.ledger_workers import commit, consume, plain_commit, plain_consume, plain_produce, produce
from benchmarks.rows import Row, against, row
from benchmarks.together import Counts, rate, together
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.records import SourceBlock, StepPlan
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.samples import sample_ref

PROMPTS = 150_000  # more than a round of the mixed load can use


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def know_prompts(path: str, count: int) -> None:
    """A new ledger that knows so many prompts."""
    ledger = SQLiteLedger(path, durability="head")
    ledger.extend(None, [SourceBlock(0, count, "0" * 16)])
    ledger.close()


class Disk:
    """Fresh files, one after another, on the disk that is measured."""

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.seconds = folder, seconds
        self._number = count()

    def path(self) -> str:
        return str(self.folder / f"{next(self._number)}.db")

    def commits(self, work: Callable[..., Counts], batch: int) -> list[Counts]:
        return together((work, {"path": self.path(), "batch": batch, "seconds": self.seconds}))

    def mixed(self, batch: int) -> list[Counts]:
        options = {"path": self.path(), "batch": batch, "seconds": self.seconds}
        know_prompts(options["path"], PROMPTS)
        return together((produce, {**options, "worker": "w"}), (consume, options))

    def plain_mixed(self, batch: int) -> list[Counts]:
        options = {"path": self.path(), "batch": batch, "seconds": self.seconds}
        return together((plain_produce, options), (plain_consume, options))


def rounds(number: int, *works: Callable[[], float]) -> list[list[float]]:
    """What each returned in every round; in a round one follows the other."""
    taken = [[work() for work in works] for _ in range(number)]
    return [list(column) for column in zip(*taken, strict=True)]


def durable(disk: Disk, repeats: int) -> Row:
    """Every commit on the disk on return."""
    plain, ours = rounds(
        repeats, lambda: rate(disk.commits(plain_commit, 256)), lambda: rate(disk.commits(commit, 256))
    )
    return against("FULL, 1 client, batch 256", ours, plain, "refs/s", limit_name="plain SQLite")


def mixed(disk: Disk, repeats: int, batch: int) -> Row:
    """Refs committed and refs acked, of both processes together."""
    parts: list[list[Counts]] = []

    def ours() -> float:
        parts.append(disk.mixed(batch))
        return rate(parts[-1])

    values, limits = rounds(repeats, ours, lambda: rate(disk.plain_mixed(batch)))
    each = [statistics.median(rate([part[n]]) for part in parts) for n in (0, 1)]
    return against(
        f"NORMAL, producer + consumer, batch {batch}",
        values,
        limits,
        "refs/s",
        limit_name="plain SQLite, same rows",
        goal=0.6,
        note=f"committed {each[0]:.0f}/s, acked {each[1]:.0f}/s; goal 100,000 refs/s",
    )


def a_step(disk: Disk, durability: Literal["head", "full"], steps: int) -> Row:
    """Plan of a step of 16 samples and ack of the one before: what the ledger adds to every step."""
    ledger = SQLiteLedger(disk.path(), durability=durability)
    session = ConsumerSession(ledger, "run0")
    session.acquire()
    ids = [f"run0:s{n}" for n in range(16 * steps)]
    for start in range(0, len(ids), 1024):
        ledger.commit(None, [sample_ref(n) for n in range(start, min(start + 1024, len(ids)))])
    took: list[float] = []
    for step in range(1, steps + 1):
        plan = StepPlan(step, tuple(ids[16 * (step - 1) : 16 * step]))
        started = time.perf_counter()
        session.plan(plan)
        session.ack(step, 0, plan.sample_ids)
        took.append(1e3 * (time.perf_counter() - started))
    ledger.close()
    note = f"one transaction; p99 {percentile(took, 0.99):.2f} ms"
    return row(
        f"plan of a step and ack of the one before, 16 samples each, {durability}",
        percentile(took, 0.5),
        "ms",
        note=note,
    )


def run(quick: bool) -> list[Row]:
    repeats = 3 if quick else 9
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as folder:
        disk = Disk(Path(folder), 0.6 if quick else 2.0)
        return [
            durable(disk, repeats),
            *(mixed(disk, repeats, batch) for batch in (32, 256)),
            *(a_step(disk, durability, 200 if quick else 1000) for durability in ("head", "full")),
        ]


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
