"""The ledger against the disk's own sync rate and against hand-written SQLite, in processes of their own.

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

from benchmarks.ledger_workers import Counts, together
from benchmarks.rows import Row, against, row
from paceline.ledger.records import StepAck, StepPlan
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.testing.samples import sample_ref

WRITERS = 8  # of the group commit
USUAL_SYNC_S = 0.001  # A cloud disk takes 1 to 4 ms; a virtual machine's may take a tenth of one.
PROMPTS = 150_000  # more than a round of the mixed load can use


def rate(counts: Sequence[Counts]) -> float:
    """Refs per second of all workers."""
    return sum(one["refs"] / one["seconds"] for one in counts)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Disk:
    """Fresh files, one after another, on the disk that is measured."""

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.seconds = folder, seconds
        self._number = count()

    def path(self) -> str:
        return str(self.folder / f"{next(self._number)}.db")

    def syncs_per_s(self, sync_takes_s: float = 0.0) -> float:
        """Append 4 KB and fdatasync, again and again. `sync_takes_s`: more than on this disk."""
        fd = os.open(self.path(), os.O_RDWR | os.O_CREAT)
        started, done = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < self.seconds / 2:
            os.write(fd, bytes(4096))
            os.fdatasync(fd)
            if sync_takes_s:
                time.sleep(sync_takes_s)
            done += 1
        os.close(fd)
        return done / passed

    def commits(
        self, durability: str, batch: int, writers: int = 1, sync_takes_s: float = 0.0
    ) -> list[Counts]:
        path = self.path()
        work = {
            "durability": durability,
            "batch": batch,
            "seconds": self.seconds,
            "sync_takes_s": sync_takes_s,
        }
        SQLiteMetadataStore(path).close()
        return together(*[("commit", {**work, "path": path, "worker": f"w{n}"}) for n in range(writers)])

    def plain_commits(self, synchronous: str, batch: int) -> list[Counts]:
        options = {"path": self.path(), "synchronous": synchronous, "batch": batch, "seconds": self.seconds}
        return together(("plain_commit", {**options, "worker": "w"}))

    def mixed(self, batch: int) -> list[Counts]:
        options = {"path": self.path(), "batch": batch, "seconds": self.seconds}
        store = SQLiteMetadataStore(options["path"], durability="head")
        store.add_tasks([f"w-{n}" for n in range(PROMPTS)])
        epoch = store.acquire_role("producer", "benchmark").epoch
        store.close()
        return together(("produce", {**options, "worker": "w", "epoch": epoch}), ("consume", options))

    def plain_mixed(self, batch: int) -> list[Counts]:
        options = {"path": self.path(), "batch": batch, "seconds": self.seconds}
        return together(("plain_produce", options), ("plain_consume", options))


def rounds(number: int, *works: Callable[[], float]) -> list[list[float]]:
    """What each returned in every round; in a round one follows the other."""
    taken = [[work() for work in works] for _ in range(number)]
    return [list(column) for column in zip(*taken, strict=True)]


def single_commits(disk: Disk, repeats: int, sync_takes_s: float) -> list[Row]:
    """P1 and P2, on this disk or on one whose syncs take longer."""
    shared: list[float] = []

    def group() -> float:
        counts = disk.commits("full", 1, WRITERS, sync_takes_s)
        shared.append(sum(one["refs"] for one in counts) / sum(one["syncs"] for one in counts))
        return rate(counts)

    syncs, single, grouped = rounds(
        repeats,
        lambda: disk.syncs_per_s(sync_takes_s),
        lambda: rate(disk.commits("full", 1, 1, sync_takes_s)),
        group,
    )
    gain = statistics.median(g / s for g, s in zip(grouped, single, strict=True))
    slower = f", {1e3 * sync_takes_s:.0f} ms added to a sync" if sync_takes_s else ""
    name = f"append 4 KB + fdatasync{slower}"
    return [
        row(name, statistics.median(syncs), "syncs/s"),
        against(f"FULL, 1 client, batch 1{slower}", single, syncs, "commits/s", limit_name=name, goal=0.9),
        against(
            f"FULL, {WRITERS} clients, batch 1{slower}",
            grouped,
            [WRITERS * one for one in syncs],
            "commits/s",
            limit_name=f"{WRITERS} x {name}",
            goal=0.9,
            note=f"{gain:.2f} x 1 client; {statistics.median(shared):.1f} commits share a sync",
        ),
    ]


def durable(disk: Disk, repeats: int) -> list[Row]:
    """P3, and what a user would otherwise write."""
    syncs, poll, plain, large = rounds(
        repeats,
        disk.syncs_per_s,
        lambda: rate(disk.plain_commits("FULL", 1)),
        lambda: rate(disk.plain_commits("FULL", 256)),
        lambda: rate(disk.commits("full", 256)),
    )
    name = "append 4 KB + fdatasync"
    return [
        against("FULL, 1 client, batch 256", large, plain, "refs/s", limit_name="plain SQLite", goal=None),
        against("plain FULL SQLite commit per poll", poll, syncs, "commits/s", limit_name=name, goal=None),
    ]


def mixed(disk: Disk, repeats: int, batch: int) -> Row:
    """P4. Refs committed and refs acked, of both processes together."""
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


def fairness(disk: Disk, repeats: int) -> Row:
    """P5. Of rounds that are long enough for chance to even out."""
    shares, waits = [], []
    longer = Disk(disk.folder / "longer", 2.0)
    for _ in range(repeats):
        counts = longer.commits("head", 8, 4)
        moved = [one["refs"] / one["seconds"] for one in counts]
        shares.append(min(moved) / max(moved))
        waits += [seconds for one in counts for seconds in one["call_seconds"]]
    share = statistics.median(shares)
    note = f"a call: p50 {1e3 * percentile(waits, 0.5):.2f} ms, p99 {1e3 * percentile(waits, 0.99):.2f} ms"
    return row(
        "smallest share of the largest, 4 writers",
        share,
        "",
        limit=1.0,
        limit_name="equal",
        ratio=share,
        goal=0.9,
        note=note,
    )


def latency(disk: Disk, commits: int) -> list[Row]:
    """From the call of a commit in one process to the wake-up of another."""
    path = disk.path()
    SQLiteMetadataStore(path).close()
    options = {"path": path, "idle_s": 1.0, "commits": commits}
    heard, rung = together(("listen", options), ("ring", {**options, "gap_s": 0.004}))
    took = [
        1e3 * (heard["seen_at"][lsn] - called)
        for lsn, called in rung["called_at"].items()
        if lsn in heard["seen_at"]
    ]
    note = f"{len(took)} commits; goal: below 2 ms"
    return [
        row("commit to wake-up of another process, p50", percentile(took, 0.5), "ms", note=note),
        row("commit to wake-up of another process, p99", percentile(took, 0.99), "ms"),
        row("CPU of a process that waits", heard["cpu_per_idle_s"], "s/s", note="asleep: no polling"),
    ]


def a_step(disk: Disk, durability: Literal["head", "full"], steps: int) -> Row:
    """Plan of a step of 16 samples and ack of the one before: what the ledger adds to every step."""
    store = SQLiteMetadataStore(disk.path(), durability=durability)
    fence = store.acquire_role("consumer", "benchmark")
    ids = [f"run0:s{n}" for n in range(16 * steps)]
    for start in range(0, len(ids), 1024):
        store.commit_samples([sample_ref(n) for n in range(start, min(start + 1024, len(ids)))])
    took: list[float] = []
    ack = None
    for step in range(1, steps + 1):
        plan = StepPlan(step, tuple(ids[16 * (step - 1) : 16 * step]), 16 * step)
        started = time.perf_counter()
        store.begin_step(plan, ack=ack, fence=fence)
        ack = StepAck(step, 0, plan.sample_ids)
        took.append(1e3 * (time.perf_counter() - started))
    store.close()
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
        rows = [*single_commits(disk, repeats, 0.0), *single_commits(disk, repeats, USUAL_SYNC_S)]
        rows += durable(disk, repeats)
        rows += [mixed(disk, repeats, batch) for batch in (32, 256)]
        rows += [a_step(disk, durability, 200 if quick else 1000) for durability in ("head", "full")]
        return [*rows, fairness(disk, repeats), *latency(disk, 200 if quick else 2000)]


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
