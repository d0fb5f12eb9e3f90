"""Throughput of the shared memory feature store, as ratios to memcpy and xxh3 in the same run.

    python benchmarks/feature_store.py [DIRECTORY]

One thread, one process that is both writer and reader, slots recycled. Prints one JSON document.
`goal` is what copying and then digesting can reach: 1 / (1 / memcpy + 1 / xxh3). `get` also has to
get fresh memory for its tensors, which memcpy into a reused buffer has not; compare it with `clone`.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing.feature_store_suite import feature_ref

RING = 8  # Samples resident at once.


def median_seconds(work: Callable[[int], object], calls: int) -> float:
    """Median time of one call, after one round over the ring that is not counted."""
    for call in range(RING):
        work(call)
    times = []
    for call in range(calls):
        started = time.perf_counter()
        work(call)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def sample(num_bytes: int) -> dict[str, torch.Tensor]:
    """Features of a capture: three quarters auxiliary states, one quarter last states."""
    tokens = num_bytes // (2 * 4 * 512)
    return {
        "input_ids": torch.zeros(tokens, dtype=torch.int32),
        "loss_mask": torch.ones(tokens, dtype=torch.uint8),
        "aux_hidden_states": torch.randn(tokens, 3 * 512).to(torch.bfloat16),
        "last_hidden_states": torch.randn(tokens, 512).to(torch.bfloat16),
    }


def measure(directory: Path, num_bytes: int) -> dict[str, float]:
    calls = max(40, min(400, (1 << 30) // num_bytes))
    tensors = sample(num_bytes)
    store = SharedMemoryFeatureStore(directory, budget_bytes=2 << 30, owner=True)
    started = time.perf_counter()
    sealed = [store.put(f"s{n}", tensors) for n in range(RING)]
    fresh = (time.perf_counter() - started) / RING
    size = sealed[0].num_bytes
    refs = [feature_ref(f"s{n}", one) for n, one in enumerate(sealed)]
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in range(RING)]
    targets = [torch.empty_like(source) for source in sources]

    def put(call: int) -> None:
        store.abort(f"s{call % RING}")
        store.put(f"s{call % RING}", tensors)

    seconds = {
        "memcpy": median_seconds(lambda n: targets[n % RING].copy_(sources[n % RING]), calls),
        "clone": median_seconds(lambda n: sources[n % RING].clone(), calls),
        "xxh3": median_seconds(lambda n: xxhash.xxh3_128(sources[n % RING].numpy().data).digest(), calls),
        "get": median_seconds(lambda n: store.get(refs[n % RING]), calls),
        "put": median_seconds(put, calls),
        "put_into_fresh_pages": fresh,
    }
    small = {
        "abort": median_seconds(lambda n: store.abort(f"s{n % RING}"), 200),
        "usage": median_seconds(lambda _: store.usage(), 200),
    }
    store.destroy()
    figures = {f"{name}_gb_per_s": size / s / 1e9 for name, s in seconds.items()}
    goal = 1 / (seconds["memcpy"] + seconds["xxh3"])
    figures["put_of_memcpy"] = seconds["memcpy"] / seconds["put"]
    figures["put_of_goal"] = 1 / seconds["put"] / goal
    figures["get_of_memcpy"] = seconds["memcpy"] / seconds["get"]
    figures["get_of_goal"] = 1 / seconds["get"] / goal
    figures |= {f"{name}_us": s * 1e6 for name, s in small.items()}
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("/dev/shm")  # noqa: S108
    directory = parent / f"paceline-bench-{uuid.uuid4().hex[:8]}"
    sizes = {"0.1MB": 100_000, "1MB": 1 << 20, "8MB": 8 << 20, "50MB": 50 << 20}
    results = {name: measure(directory, num_bytes) for name, num_bytes in sizes.items()}
    print(json.dumps({"machine": platform.processor() or platform.machine(), "samples": results}, indent=2))


if __name__ == "__main__":
    main()
