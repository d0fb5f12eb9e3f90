"""The settled prefix with 1, 2, 4 and 8 producers: how fast it grows, and how soon a commit is part of it.

    python -m benchmarks.prefix [--quick]

Producers lease, reserve and commit groups of 32 in processes of their own; a consumer reads the log as far as
it is settled, plans and acks. At full speed its refs per second are set against the same rows written by hand
into the same kind of store. The delay, from a commit's return until the consumer has read the whole group, is
measured at a load of 640 refs per second, which all producers share.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.control_plane import PROMPTS, Disk, know_prompts, percentile, rounds
from benchmarks.ledger_server import Measured
from benchmarks.ledger_workers import (
    RUN,
    WAIT_S,
    commit_leased,
    consume,
    opened,
    plain_consume,
    plain_produce,
    produce,
)
from benchmarks.rows import Row, against
from benchmarks.together import Counts, ready, together
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import StepPlan
from paceline.testing.valkey_server import ValkeyServer

GROUP = 32
PRODUCERS = (1, 2, 4, 8)
GROUPS_A_SECOND = 20


def produce_slowly(path: str, groups: int, pause_s: float, worker: str) -> Counts:
    """When each group, by its first ordinal, was committed; a group each `pause_s`."""
    session = ProducerSession(opened(path, "head"), RUN, worker)
    session.acquire()
    ready()
    committed, begun = {}, time.monotonic()
    for number in range(groups):
        time.sleep(max(0.0, begun + number * pause_s - time.monotonic()))
        leases = session.lease(GROUP, GROUP)
        commit_leased(session, leases)
        committed[leases[0].ordinal] = time.monotonic()
    return {"committed": committed}


def read_slowly(path: str, groups: int) -> Counts:
    """When each group was part of the prefix, for who waits for it."""
    session = ConsumerSession(opened(path, "head"), RUN)
    session.acquire()
    ready()
    seen = {}
    for number in range(groups):
        mark = session.lsn()
        while len(entries := session.read(number * GROUP, (number + 1) * GROUP).entries) < GROUP:
            mark = session.wait(mark, WAIT_S)
        seen[number * GROUP] = time.monotonic()
        step = number + 1
        session.plan(StepPlan(step, tuple(entry.sample_id for entry in entries)))
        session.ack(step, 0, [entry.sample_id for entry in entries])
    return {"seen": seen}


def delays_ms(path: str, producers: int, seconds: float) -> list[float]:
    """`path`: of a fresh ledger that knows its prompts."""
    groups = max(2, round(seconds * GROUPS_A_SECOND / producers))
    pause_s = producers / GROUPS_A_SECOND
    slow = [
        (produce_slowly, {"path": path, "groups": groups, "pause_s": pause_s, "worker": f"w{n}"})
        for n in range(producers)
    ]
    *told, read = together(*slow, (read_slowly, {"path": path, "groups": groups * producers}))
    committed = {first: at for one in told for first, at in one["committed"].items()}
    return [1000 * (at - committed[first]) for first, at in read["seen"].items()]


def on_a_disk(disk: Disk, producers: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """What the consumer reads per second: of the ledger, and of the rows by hand."""

    def ours() -> float:
        options = {"path": fresh(disk), "batch": GROUP, "seconds": disk.seconds}
        makers = [(produce, {**options, "worker": f"w{n}"}) for n in range(producers)]
        return of_consumer(together(*makers, (consume, options)))

    def plain() -> float:
        options = {"path": disk.path(), "batch": GROUP, "seconds": disk.seconds}
        makers = [(plain_produce, {**options, "number": n, "of": producers}) for n in range(producers)]
        return of_consumer(together(*makers, (plain_consume, options)))

    return ours, plain


def fresh(disk: Disk) -> str:
    know_prompts(path := disk.path(), PROMPTS)
    return path


def of_consumer(counts: list[Counts]) -> float:
    return float(counts[-1]["refs"] / counts[-1]["seconds"])


def rows_of(
    store: str,
    limit_name: str,
    works: Callable[[int], tuple[Callable[[], float], Callable[[], float]]],
    new_ledger: Callable[[], str],
    quick: bool,
) -> Iterator[Row]:
    for producers in PRODUCERS:
        values, limits = rounds(1 if quick else 5, *works(producers))
        delays = delays_ms(new_ledger(), producers, 1.0 if quick else 4.0)
        yield against(
            f"prefix, {producers} producer{'s' * (producers > 1)}, {store}",
            values,
            limits,
            "refs/s",
            limit_name=limit_name,
            note=f"at {GROUPS_A_SECOND * GROUP} refs/s a commit is read after "
            f"{statistics.median(delays):.1f} ms, p95 {percentile(delays, 0.95):.1f}",
        )


def run(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as place:
        folder, seconds = Path(place), 1.0 if quick else 2.0
        disk = Disk(folder / "files", seconds)
        rows = list(
            rows_of("SQLite", "plain SQLite", lambda n: on_a_disk(disk, n), lambda: fresh(disk), quick)
        )
        with ValkeyServer(folder, appendfsync="everysec", auto_aof_rewrite_percentage="0") as server:
            measured = Measured(server, seconds)
            rows += rows_of(
                "Valkey",
                "bare server",
                lambda n: (
                    lambda: of_consumer(measured.ours(GROUP, n)),
                    lambda: of_consumer(measured.bare(GROUP, n)),
                ),
                measured.ledger,
                quick,
            )
    return rows


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
