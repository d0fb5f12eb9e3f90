"""Several ranks with torch and gloo: struck at named points, then the real command at random times."""

from __future__ import annotations

from paceline.testing import random_kills, rank_schedules

SCHEDULES = 200  # at scale 1, of 2 ranks and 2 producers, and half as many where the ranks are sharded
RUNS, KILLS = 4, 6  # of the command, with as many ranks and producers


def run(scale: float, seed: int) -> dict[str, int]:
    """Raises Violation, with the command that repeats the schedule or the run."""
    first = seed * 10_000
    counts = rank_schedules.execute_all(range(first, first + max(1, round(SCHEDULES * scale))))
    sharded = range(first, first + max(1, round(SCHEDULES * scale / 2)))
    of_sharded = rank_schedules.execute_all(sharded, sharded=True)
    runs = random_kills.execute_all(range(first, first + max(1, round(RUNS * scale))), KILLS, ranks=2)
    counts.update({f"sharded: {name}": count for name, count in of_sharded.items()})
    return {**counts, **{f"the command: {name}": count for name, count in runs.items()}}
