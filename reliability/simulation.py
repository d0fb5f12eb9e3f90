"""Simulated runs by the ten thousand; see src/paceline/testing/simulation.py."""

from __future__ import annotations

from collections import Counter

from paceline.testing.simulation import simulate

SEEDS = 100_000
OFFSET = 1_000_000  # beyond the seeds of CI


def run(scale: float, seed: int) -> dict[str, int]:
    """`SEEDS * scale` seeds from an offset that `seed` moves; what happened in them."""
    first = OFFSET + seed * 10_000_000
    happened: Counter[str] = Counter()
    for number in range(first, first + round(SEEDS * scale)):
        happened.update(simulate(number))
    return dict(happened.most_common())
