"""What the ledger takes of a training step, with the sizes of the CPU recipe.

    python -m benchmarks.ledger_share [--quick]

A step is that of recipes/smollm2-cpu.yaml: two samples of 60 to 250 tokens, forward, backward and AdamW over
a draft of SmolLM2-135M with 6,144 tokens and depth 3, on one thread. The consumer's calls for such a step are
made by its session on a SQLite ledger on the disk: the log is read, the step planned, the step before acked,
and every 200 steps a checkpoint becomes the head and what it covers is released. Here every visit is a
sample's last one, so acks and releases are twice the recipe's. Steps and calls take turns within one run.
PACELINE_BENCH_DIR names the disk.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.rows import Row, row
from benchmarks.training_step import ours, spread_samples, target_head
from paceline.features.store import Written
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.methods.eagle3.method import Eagle3Method
from paceline.testing.ledger_calls import RUN_ID, checkpoint_of, ids_of, trained_step
from paceline.testing.samples import sample_ref
from paceline.training.determinism import compute_deterministically
from paceline.training.optimizer import build_optimizer
from paceline.training.settings import TrainingSection

BATCH, DEPTH, DRAFT_VOCABULARY, INTERVAL = 2, 3, 6144, 200  # the recipe's
GOAL = 0.01


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def training() -> Callable[[], None]:
    """A step of it."""
    method = Eagle3Method({"ttt_steps": DEPTH, "draft_vocab_size": DRAFT_VOCABULARY, "init": "random"})
    samples = spread_samples(BATCH)
    draft = method.build(target_head(), samples, seed=0)
    optimizer = build_optimizer(draft, TrainingSection())

    def step() -> None:
        ours(method, draft, samples)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Calls:
    """The consumer's, for steps of samples that are there."""

    def __init__(self, path: Path, steps: int) -> None:
        self._ledger = SQLiteLedger(path, durability="head")
        self._ledger.commit(None, [sample_ref(number) for number in range(BATCH * steps)])
        self._session = ConsumerSession(self._ledger, RUN_ID)
        self._session.acquire()
        self._step, self._chain = 0, ""

    def steps(self, count: int) -> None:
        """`count` steps and the checkpoint that covers them."""
        session, lineage = self._session, []
        for _ in range(count):
            first, self._step = BATCH * self._step, self._step + 1
            session.read(first, first + BATCH)
            trained = trained_step(self._step, *range(first, first + BATCH))
            session.plan(trained.plan)
            session.ack(self._step, 0, ids_of(*range(first, first + BATCH)))
            lineage.append(trained)
        session.write_ack()
        record = checkpoint_of(lineage, self._chain, first_place=BATCH * self._step)
        session.head(record)
        session.retire(2)
        session.release(self)
        self._chain = record.chain

    def free(self, written: Iterable[Written]) -> None:
        """No bytes are there."""

    def close(self) -> None:
        self._ledger.close()


def run(quick: bool) -> list[Row]:
    compute_deterministically(threads=1)
    turns, step = 3 if quick else 9, training()
    step()  # the first touches fresh memory
    shares = list[float]()
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as folder:
        calls = Calls(Path(folder) / "ledger.db", turns * INTERVAL)
        for _ in range(turns):
            a_step = statistics.median(seconds(step) for _ in range(3 if quick else 9))
            shares.append(seconds(lambda: calls.steps(INTERVAL)) / INTERVAL / a_step)
        calls.close()
    share = statistics.median(shares)
    goal = {"limit": GOAL, "limit_name": "goal", "ratio": GOAL / share, "goal": 1.0}
    return [row("share of a step spent in the ledger, the recipe's sizes", share, "", **goal)]


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
