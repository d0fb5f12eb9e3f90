"""Real processes killed, stopped and woken up: every named point, then seeded mixtures of five faults."""

from __future__ import annotations

from paceline.testing.kill_schedules import execute_all, random_schedule, systematic

RANDOM = 9_000  # schedules at scale 1, besides the systematic ones


def run(scale: float, seed: int) -> dict[str, int]:
    """Raises Violation, with the command that repeats the schedule."""
    first = seed * 1_000_000
    schedules = systematic() + [random_schedule(first + n) for n in range(round(RANDOM * scale))]
    return dict(execute_all(schedules, jobs=1))
