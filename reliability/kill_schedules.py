"""Real processes killed, stopped and woken up: every named point, then seeded mixtures of five faults."""

from __future__ import annotations

from collections import Counter

from paceline.testing.kill_schedules import execute_all, of_ranks, of_several, random_schedule, systematic

RANDOM = 9_000  # schedules at scale 1, besides the systematic ones
SEVERAL, ON_A_SERVER = 600, 600  # of three producers, and of three producers with the ledger on a server
WITH_RANKS = 600  # of two ranks and two producers
EVERY = 4  # one in so many systematic schedules is also played on a server; which ones, follows from the seed


def run(scale: float, seed: int) -> dict[str, int]:
    """Raises Violation, with the command that repeats the schedule."""
    first = seed * 1_000_000
    schedules = systematic() + [random_schedule(first + n) for n in range(round(RANDOM * scale))]
    counts = execute_all(schedules, jobs=1)
    several = [of_several(random_schedule(first + n), 3) for n in range(round(SEVERAL * scale))]
    counts += labelled("three producers", execute_all(several, jobs=1))
    ranks = [of_ranks(of_several(random_schedule(first + n), 2), 2) for n in range(round(WITH_RANKS * scale))]
    counts += labelled("two ranks", execute_all(ranks, jobs=1))
    served = [of_several(random_schedule(first + n), 3) for n in range(round(ON_A_SERVER * scale))]
    served += systematic(on_server=True)[seed % EVERY :: EVERY]
    counts += labelled("on a server", execute_all(served, jobs=1, on_server=True))
    return dict(counts)


def labelled(label: str, counts: Counter[str]) -> Counter[str]:
    """The few counts that say that something happened."""
    return Counter(
        {f"{label}: {name}": counts[name] for name in ("schedules", "faults that struck", "zombies")}
    )
