"""Power failures at every point of whole light runs; see src/paceline/testing/power_cuts.py."""

from __future__ import annotations

import random
import shutil
from collections import Counter

from paceline.testing.kill_schedules import new_folder
from paceline.testing.light_run import RunShape
from paceline.testing.power_cuts import cut_everywhere

RUNS = 12


def run(scale: float, seed: int) -> dict[str, int]:
    """Runs of random shapes; at a smaller scale fewer of them, still at every point."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    for _ in range(max(1, round(RUNS * scale))):
        shape = RunShape(
            prompts=rng.randint(6, 16),
            group=rng.randint(2, 4),
            batch=rng.randint(2, 4),
            passes=rng.randint(1, 2),
            interval=rng.randint(1, 4),
            kept=rng.randint(2, 3),
            bad_prompt=rng.randint(0, 5) if rng.random() < 0.3 else -1,
            bad_sample=rng.randint(0, 5) if rng.random() < 0.3 else -1,
        )
        folder = new_folder()
        counts += cut_everywhere(folder, shape)
        shutil.rmtree(folder)
        counts["runs"] += 1
    return dict(counts)
