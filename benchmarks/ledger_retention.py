"""How large the ledger gets, and how long a restart takes, as a run grows.

Drives the ledger as producer and consumer do (lease, reserve, commit, begin, ack, checkpoint, release,
fold), without engines, features or models. Both figures must not grow with history: the size by a few
bytes a sample at most, the restart not at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from paceline.ledger.records import CheckpointRecord, Fence, StepPlan, chain_of
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.testing.samples import sample_ref

GROUP = 1024
BATCH = 8
STEPS_OF_A_CHECKPOINT = GROUP // BATCH
PROMPTS_OF_A_ROUND = 100_000


def task_ids(count: int) -> list[str]:
    """As a run names them: round/prompt."""
    return [f"{n // PROMPTS_OF_A_ROUND}/alpaca-{n % PROMPTS_OF_A_ROUND:05d}" for n in range(count)]


class Run:
    def __init__(self, path: Path, samples: int) -> None:
        self.store = SQLiteMetadataStore(path, durability="head")
        self.store.add_tasks(task_ids(samples))
        self.producer: Fence = self.store.acquire_role("producer", "benchmark")
        self.consumer: Fence = self.store.acquire_role("consumer", "benchmark")
        self.template = sample_ref(0, run_id="smollm2-cpu")
        self.step, self.chain = 0, ""

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
        last_seq, names = store.committed_count(), list(ids.values())
        for start in range(0, len(names), BATCH):
            self.step += 1
            plan = StepPlan(self.step, tuple(names[start : start + BATCH]), last_seq)
            store.begin_step(plan, fence=self.consumer)
            store.ack_step(self.step, 0, plan.sample_ids, fence=self.consumer)
            self.chain = chain_of(self.chain, [plan])
        self._checkpoint(last_seq)
        return True

    def _checkpoint(self, last_seq: int) -> None:
        store, fence = self.store, self.consumer
        record = CheckpointRecord(self.step, f"step-{self.step}", "0" * 64, last_seq, self.chain)
        store.record_checkpoint(record, fence=fence)
        refs = store.begin_release(GROUP, fence=fence)
        store.record_released([ref.sample_id for ref in refs], fence=fence)
        for old in store.checkpoints()[:-2]:
            store.forget_checkpoint(old.step, fence=fence)
        store.compact(fence=fence)


def restart_seconds(path: Path) -> float:
    """What both roles ask of the ledger when they start."""
    started = monotonic()
    store = SQLiteMetadataStore(path, durability="head")
    for role in ("producer", "consumer"):
        store.acquire_role(role, "restart")
    store.facts(), store.task_counts(), store.checkpoints(), store.present_generations()
    store.usage(), store.lost_ids(), store.quarantined(), store.begin_release(1000)
    store.read_committed(store.committed_count() - 64, 64)
    store.close()
    return monotonic() - started


def measure(samples: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as folder:
        path = Path(folder) / "ledger.db"
        started = monotonic()
        run = Run(path, samples)
        while run.group():
            pass
        seconds = monotonic() - started
        run.store.close()
        size = path.stat().st_size
        restart = min(restart_seconds(path) for _ in range(5))
    return {
        "samples": samples,
        "database_mib": round(size / 2**20, 2),
        "bytes_per_sample": round(size / samples, 2),
        "restart_ms": round(1e3 * restart, 2),
        "samples_per_s": round(samples / seconds),
    }


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    rows = []
    for samples in [int(word) for word in sys.argv[1:]] or [1_000, 100_000]:
        rows.append(measure(samples))
        print(json.dumps(rows[-1]), flush=True)
    result = {"benchmark": "ledger_retention", "commit": commit.stdout.strip(), "rows": rows}
    day = datetime.now(tz=UTC).date().isoformat()
    path = Path(__file__).parent / "results" / f"{day}-ledger-retention.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
