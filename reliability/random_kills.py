"""The real command on a tiny real target, its processes killed at random times: the same weights always."""

from __future__ import annotations

from paceline.testing.random_kills import execute_all

RUNS, KILLS = 6, 6  # runs at scale 1, and kills in each


def run(scale: float, seed: int) -> dict[str, int]:
    """Raises Violation, with the command that repeats the run."""
    first = seed * 1_000
    return dict(execute_all(range(first, first + max(1, round(RUNS * scale))), KILLS))
