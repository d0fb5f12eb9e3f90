"""Capture against the target's bare forward: how much of the producer's time is the model's own.

    python -m benchmarks.capture [--quick]

The target of pipeline.py answers groups of 32 prompts with 96 tokens each, greedy and sampled in turns, and
every sample is put into shared memory, with the rows that EAGLE-3 reads. The limit is the rate at which the
decoder's forward and lm_head alone went through the same tokens, in the same calls; the rest of the time is
this project's: keeping states, choosing tokens, cutting samples out, the put with its digest.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.data_plane import SHARED_MEMORY
from benchmarks.pipeline import GROUP, make_target
from benchmarks.rows import Row, against, row
from paceline.engines.capture_rows import CaptureRows
from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.methods.eagle3.method import Eagle3Method
from paceline.types import Tokens, name_of

ANSWER_TOKENS = 96
PARTS = {
    "keep": [(CaptureRows, "keep"), (CaptureRows, "keep_known"), (CaptureRows, "keep_shared")],
    "choose": [(CaptureRows, "choose")],
    "cut out": [(CaptureRows, "samples")],
    "put": [(SharedMemoryFeatureStore, "put")],
}


@contextmanager
def timed(parts: dict[str, list[tuple[Any, str]]], seconds: Counter[str]) -> Iterator[None]:
    """Adds up the seconds spent in each part's methods."""

    def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - started  # type: ignore[assignment]

        return call

    with ExitStack() as stack:
        for name, methods in parts.items():
            for owner, method in methods:
                stack.enter_context(patch.object(owner, method, wrapped(name, getattr(owner, method))))
        yield


def requests(seed: int, temperature: float = 1.0) -> list[CaptureRequest]:
    """Prompts of 8 to 64 tokens, so that no two groups are alike."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 65, (GROUP,), generator=draw).tolist()
    prompts = [tuple(torch.randint(3, 4096, (n,), generator=draw).tolist()) for n in lengths]
    return [
        CaptureRequest(f"{seed}:{n}", prompt, (), ANSWER_TOKENS, temperature, seed * GROUP + n)
        for n, prompt in enumerate(prompts)
    ]


class Rates:
    """Tokens per second of whole groups and of the model alone, and the share of each part of the time."""

    def __init__(self) -> None:
        self.whole: list[float] = []
        self.model: list[float] = []
        self.shares: dict[str, list[float]] = {name: [] for name in PARTS}

    def add(self, tokens: int, seconds: Counter[str]) -> None:
        total = seconds["capture"] + seconds["put"]
        self.whole.append(tokens / total)
        self.model.append(tokens / seconds["model"])
        for name, found in self.shares.items():
            found.append(seconds[name] / total)

    def rows(self, way: str) -> list[Row]:
        limit = {"limit_name": "bare forward and lm_head, same run", "goal": 0.95}
        ratios = sorted(whole / model for whole, model in zip(self.whole, self.model, strict=True))
        note = f"groups: {ratios[0]:.3f} to {ratios[-1]:.3f}"
        shares = [
            row(f"share of it, {way}: {name}", statistics.median(found), "")
            for name, found in self.shares.items()
        ]
        return [
            against(f"answer {way}, capture, put", self.whole, self.model, "tokens/s", note=note, **limit),
            *shares,
        ]


def run(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    folder = SHARED_MEMORY / f"paceline-bench-{uuid.uuid4().hex[:8]}"
    features = SharedMemoryFeatureStore(folder, budget_bytes=1 << 30, owner=True)
    ways = {"greedy": (0.0, Rates()), "sampled": (1.0, Rates())}
    with tempfile.TemporaryDirectory() as place:
        engine = TransformersEngine(make_target(Path(place)))
        wanted = Eagle3Method().features(engine.facts)
        tokens = name_of(Tokens, wanted)
        own: list[tuple[Any, str]] = [(engine, "_forward"), (engine._model.lm_head, "forward")]
        for seed in range((3 if quick else 12) + 1):
            for temperature, rates in ways.values():
                seconds: Counter[str] = Counter()
                with timed({**PARTS, "model": own, "capture": [(engine, "capture")]}, seconds):
                    captured = engine.capture(requests(seed, temperature), wanted)
                    for sample in captured:
                        features.put(sample.sample_id, sample.tensors)
                for sample in captured:
                    features.free([(sample.sample_id, 0)])
                if seed:  # the first warms up
                    rates.add(sum(sample.tensors[tokens].numel() - 1 for sample in captured), seconds)
    features.destroy()
    return [found for way, (_, rates) in ways.items() for found in rates.rows(way)]


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
