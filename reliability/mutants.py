"""How many simulated runs it takes to find each planted bug; see src/paceline/testing/mutants.py."""

from __future__ import annotations

from paceline.testing.mutants import MUTANTS, seeds_to_detect

SEEDS = 3_000


def run(scale: float, seed: int) -> dict[str, int]:  # noqa: ARG001 (the same bugs for every seed)
    """Seeds to detect by mutant; 0: the simulation did not meet it, a directed test finds it."""
    seeds = max(1, round(SEEDS * scale))
    return {name: seeds_to_detect(name, seeds) or 0 for name in MUTANTS}
