"""What a checkpoint costs: the stall of training, the write behind it, and both over an interval.

    python -m benchmarks.checkpoint [--quick]

A stand-in learner holds tensors the size of a draft for SmolLM2-135M and its AdamW state (about 120 MB) and
computes matrix products of fixed size for steps. Everything else is the product's: staging, the folder, the
ledger's head. PACELINE_BENCH_DIR names the disk.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Row, against, row
from paceline import durable_files
from paceline.durable_files import FileContent
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.records import StepPlan, TrainedStep
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.checkpoint_writer import CheckpointWriter, InlineExecutor
from paceline.training.recovery import Start
from paceline.training.tensor_files import FileBuffers

SIZES = {"draft": 40 << 20, "optimizer": 80 << 20}
TENSOR_BYTES = 4 << 20
SYNC_FACTOR, SLACK_S = 4, 0.010  # goal P13: what a commit may cost beyond its bytes
INTERVAL = 50


class Trained:
    """One run's checkpoints, and steps to put between them."""

    def __init__(self, folder: Path, executor: Executor) -> None:
        numbers = range(max(SIZES.values()) // TENSOR_BYTES)
        self.tensors = {
            name: {f"{n}": torch.randn(TENSOR_BYTES // 4) for n in numbers if n < size // TENSOR_BYTES}
            for name, size in SIZES.items()
        }
        self.reports: list[dict[str, Any]] = []
        self.step = 0
        self._staging = FileBuffers()
        self._left, self._right = torch.randn(1024, 1024), torch.randn(1024, 1024)
        self.session = ConsumerSession(SQLiteLedger(folder / "ledger.db"), "bench")
        self.session.acquire()
        self.commits = CheckpointWriter(
            self.session,
            InMemoryFeatureStore(budget_bytes=1 << 20),
            CheckpointFolder(folder / "checkpoints", "bench"),
            Start(),
            executor,
            kept=2,
            report=lambda _, **fields: self.reports.append(fields),
        )

    def files(self) -> dict[str, FileContent]:
        return {name: self._staging.file(name, tensors) for name, tensors in self.tensors.items()}

    def train(self) -> None:
        """A step of about a tenth of a second."""
        self.step += 1
        self.session.plan(StepPlan(self.step, ()))
        for _ in range(4):
            torch.mm(self._left, self._right)
        self.session.ack(self.step, 0, [])
        self.commits.add(TrainedStep(self.step, 0, ()))
        self.commits.poll()

    def stage(self) -> float:
        """Seconds that training waits."""
        started = time.perf_counter()
        self.commits.begin(self.step, 0, self.files, {})
        return time.perf_counter() - started


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def staging(rounds: int) -> Row:
    """Training's only wait, against a memcpy of as many bytes into memory that is there."""
    tensors = {f"{n}": torch.randn(TENSOR_BYTES // 4) for n in range(sum(SIZES.values()) // TENSOR_BYTES)}
    size = len(tensors) * TENSOR_BYTES
    source, target, place = torch.randn(size // 4), torch.zeros(size // 4), FileBuffers()
    place.file("all", tensors)
    values, limits = [], []
    for _ in range(rounds):
        values.append(size / seconds_of(lambda: place.file("all", tensors)) / 1e9)
        limits.append(size / seconds_of(lambda: target.copy_(source)) / 1e9)
    return against(f"staging {size >> 20} MB", values, limits, "GB/s", limit_name="memcpy", goal=0.8)


def plain_write(folder: Path, number: int) -> tuple[float, float]:
    """Seconds to write and sync a checkpoint's bytes into one file, and seconds of one more sync."""
    content = memoryview(bytearray(sum(SIZES.values())))
    whole = seconds_of(lambda: durable_files.write_file(folder / f"plain-{number}", content))
    small = seconds_of(lambda: durable_files.write_file(folder / f"small-{number}", b"x"))
    (folder / f"plain-{number}").unlink()
    return whole, small


def commit(folder: Path, rounds: int) -> list[Row]:
    """A checkpoint that training waits for, against writing its bytes, and one that it does not wait for."""
    plain: list[tuple[float, float]] = []
    waits = {}
    for name, executor in (("waits", InlineExecutor()), ("goes on", ThreadPoolExecutor(1))):
        place = folder / name.replace(" ", "-")
        place.mkdir()
        run = Trained(place, executor)
        waits[name] = []
        for number in range(rounds + 1):
            if name == "waits":
                plain.append(plain_write(place, number))
            run.train()
            wait = run.stage()
            waited = seconds_of(run.commits.settle)
            if number:  # the first takes fresh memory
                waits[name].append(wait + waited if name == "waits" else wait)
    whole = [one[0] for one in plain[1:]]
    allowed = [one[0] + SYNC_FACTOR * one[1] + SLACK_S for one in plain[1:]]
    megabytes = sum(SIZES.values()) >> 20
    return [
        row(f"write and sync {megabytes} MB", 1e3 * statistics.median(whole), "ms"),
        against(
            f"checkpoint of {megabytes} MB, training waiting",
            [1 / seconds for seconds in waits["waits"]],
            [1 / seconds for seconds in allowed],
            "1/s",
            limit_name="bytes, 4 syncs, 10 ms",
            goal=1.0,
            note=f"{1e3 * statistics.median(waits['waits']):.0f} ms, sha256 of every byte included",
        ),
        row(
            "checkpoint written behind training: its stall",
            1e3 * statistics.median(waits["goes on"]),
            "ms",
            note="staging; the rest is another thread's",
        ),
    ]


def interval(folder: Path, rounds: int) -> Row:
    """Steps per second with a checkpoint every so many steps, against steps alone."""
    run = Trained(folder, ThreadPoolExecutor(1))
    run.train()
    run.stage()
    run.commits.settle()
    with_, without = [], []
    for _ in range(rounds):
        without.append(INTERVAL / seconds_of(lambda: [run.train() for _ in range(INTERVAL)]))
        with_.append(INTERVAL / seconds_of(lambda: (run.stage(), [run.train() for _ in range(INTERVAL)])))
        run.commits.settle()
    step_ms = 1e3 / statistics.median(without)
    return against(
        f"steps with a checkpoint every {INTERVAL}",
        with_,
        without,
        "steps/s",
        limit_name="no checkpoints",
        goal=0.97,
        note=f"steps of {step_ms:.0f} ms; the writing thread has the other core",
    )


def run(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    numbers = count()
    rounds = 5 if quick else 20
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as place:
        folders = [Path(place) / str(next(numbers)) for _ in range(2)]
        for folder in folders:
            folder.mkdir()
        return [staging(4 * rounds), *commit(folders[0], rounds), interval(folders[1], 3 if quick else 7)]


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
