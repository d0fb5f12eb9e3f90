"""Several producers of one run: what a kill costs, and whether three capture three times as much as one.

    python -m benchmarks.producers [--quick]

The engine answers a group in a fixed time, as a device or a server of its own would, and needs no processor:
three of them fit on two cores. All else is the product: ledger, sessions, leases, heartbeats, budget, loader,
trainer and checkpoints, each role in a process of its own; features are small files, weights a hash.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, against, row
from benchmarks.together import Counts, counted, go, ready, started, together
from paceline.testing.light_adapters import LightEngine
from paceline.testing.light_run import LightRun, RunShape, build_consumer, build_producer
from paceline.testing.valkey_server import ValkeyServer

GROUP, BATCH = 32, 8
TIMEOUT_S = 1.0
GOAL = 0.95
ARCHIVE_FROM = 4096  # as in a real run


@dataclass(frozen=True)
class Shape(RunShape):
    """`group_s`: how long the engine takes for a group."""

    group_s: float = 0.0

    def engine(self) -> LightEngine:
        def answer(sample_ids: Sequence[str]) -> None:
            print(json.dumps(sample_ids), flush=True)
            time.sleep(self.group_s)

        return LightEngine(answer)


def shape_of(groups: int, producers: int, group_s: float) -> Shape:
    return Shape(
        prompts=groups * GROUP,
        group=GROUP,
        batch=BATCH,
        interval=50,
        threads=True,
        producers=producers,
        timeout_s=TIMEOUT_S,
        heartbeats=True,
        group_s=group_s,
    )


def opened(folder: str, server: str, shape: dict[str, Any]) -> tuple[LightRun, Any]:
    run = LightRun(Path(folder), Shape(**shape), server)
    ledger = run.open_ledger()
    ledger.archive_from = ARCHIVE_FROM
    return run, ledger


def capture(folder: str, server: str, shape: dict[str, Any], worker: str) -> Counts:
    """When each group was committed, and how many samples."""
    run, ledger = opened(folder, server, shape)
    events: list[tuple[float, int, int]] = []

    def report(event: str, **fields: Any) -> None:
        if event == "group":
            events.append((time.monotonic(), fields["samples"], fields["group"]))

    features = run.open_features(owner=True)
    producer = build_producer(run.shape, ledger, features, worker=worker, report=report)
    ready()
    producer.run()
    return {"groups": events}


def train(folder: str, server: str, shape: dict[str, Any]) -> Counts:
    """When each step was trained, and of how many samples."""
    run, ledger = opened(folder, server, shape)
    events: list[tuple[float, int]] = []

    def report(event: str, **fields: Any) -> None:
        if event == "step":
            events.append((time.monotonic(), fields["samples"]))

    ready()
    features = run.open_features(owner=False)
    with ThreadPoolExecutor(2) as executor:
        trainer, loader = build_consumer(
            run.shape, ledger, features, run.checkpoints, executor=executor, report=report
        )
        trainer.fit(loader)
    return {"steps": events}


def rate(events: Sequence[Sequence[Any]]) -> float:
    """Samples per second from the first event to the last."""
    ordered = sorted(events)
    seconds: float = ordered[-1][0] - ordered[0][0]
    return sum(event[1] for event in ordered[1:]) / seconds


class Runs:
    """Fresh runs in folders of their own, with the ledger in a file (`server`: "") or on a server."""

    def __init__(self, folder: Path, server: str) -> None:
        self._folder, self._server = folder, server

    def options(self, shape: Shape) -> dict[str, Any]:
        folder = tempfile.mkdtemp(dir=self._folder)
        return {"folder": folder, "server": self._server, "shape": asdict(shape)}

    def alone(self, groups: int, group_s: float) -> tuple[float, float]:
        """What one producer captures per second with nobody reading, and what is trained of that alone."""
        options = self.options(shape_of(groups, 1, group_s))
        [captured] = together((capture, {**options, "worker": "0"}))
        [trained] = together((train, options))
        return rate(captured["groups"]), rate(trained["steps"])

    def three(self, groups: int, group_s: float) -> float:
        """What a consumer trains per second of what three producers capture meanwhile."""
        options = self.options(shape_of(3 * groups, 3, group_s))
        makers = [(capture, {**options, "worker": str(n)}) for n in range(3)]
        *captured, trained = together(*makers, (train, options))
        last = max(at for one in captured for at, *_ in one["groups"])
        return rate([step for step in trained["steps"] if step[0] <= last])

    def kill(self) -> float:
        """Seconds from the kill of one of two producers until the other has captured its group."""
        options = self.options(shape_of(8, 2, 0.1))
        processes = [started(capture, {**options, "worker": str(n)}) for n in range(2)]
        go(*processes)
        victim, other = processes
        assert victim.stdout is not None
        lines: Iterator[str] = iter(victim.stdout)
        next(lines)
        held = json.loads(next(lines))  # of its second group
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        victim.communicate()
        group = int(held[0].partition(":")[2]) // GROUP
        [captured] = [at for at, _, number in counted(other)["groups"] if number == group]
        return float(captured - killed)


def killed(runs: Runs, store: str, repeats: int) -> Row:
    took = [runs.kill() for _ in range(repeats)]
    return row(
        f"a producer's kill to its group captured by another, {store}",
        statistics.median(took),
        "s",
        limit=TIMEOUT_S,
        limit_name="time-out",
        ratio=TIMEOUT_S / statistics.median(took),
        note=f"{min(took):.2f} to {max(took):.2f} s; one that is started again takes its own work at once",
    )


def threefold(runs: Runs, store: str, repeats: int, groups: int, group_s: float) -> Row:
    """By turns first, because a machine is a few percent faster in one minute than the next."""
    values, limits, sides = list[float](), list[float](), list[tuple[float, float]]()
    for number in range(repeats):
        parts = [
            lambda: sides.append(runs.alone(groups, group_s)),
            lambda: values.append(runs.three(groups, group_s)),
        ]
        for part in parts[:: 1 if number % 2 else -1]:
            part()
        limits.append(min(3 * sides[-1][0], sides[-1][1]))
    one, trained = (statistics.median(side[n] for side in sides) for n in (0, 1))
    return against(
        f"whole run with three producers, {store}: samples trained",
        values,
        limits,
        "samples/s",
        limit_name="three times one, or the consumer alone",
        goal=GOAL,
        note=f"a group takes the engine {group_s:g} s; one producer: {one:.0f}/s, consumer alone: "
        f"{trained:.0f}/s",
    )


def run(quick: bool) -> list[Row]:
    repeats, groups, group_s = (1, 8, 1.0) if quick else (5, 16, 1.0)
    rows: list[Row] = []
    with ExitStack() as held:
        place = held.enter_context(tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")))
        server = held.enter_context(ValkeyServer(Path(place), appendfsync="everysec"))
        for store, url in (("SQLite", ""), ("Valkey", server.url)):
            runs = Runs(Path(place), url)
            rows += [killed(runs, store, 3 if quick else 9), threefold(runs, store, repeats, groups, group_s)]
    return rows


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
