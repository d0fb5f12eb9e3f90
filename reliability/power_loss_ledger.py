"""Power failures under the ledger by the thousand, and failing file operations (testing/broken_files.py)."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from pathlib import Path

from paceline.testing.broken_files import FAULTS, fail_calls, fail_recovery, lose_power

HISTORIES = 40


def run(scale: float, seed: int) -> dict[str, int]:
    """Images of `HISTORIES * scale` histories in either mode, and every n-th fault of a few more."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for number in range(round(HISTORIES * scale)):
            for durability in ("full", "head"):
                place = Path(folder) / f"{durability}-{number}"
                found = lose_power(
                    place,
                    1000 * seed + number,
                    durability,  # type: ignore[arg-type]
                    calls=150,
                    per_interval=4,
                )
                counts.update({f"{name} ({durability})": count for name, count in found.items()})
        for number in range(max(1, round(3 * scale))):
            for fault, lasting in itertools.product(FAULTS, (False, True)):
                place = Path(folder) / f"fault-{number}-{fault}-{lasting}"
                found = fail_calls(place / "calls", 1000 * seed + number, fault, lasting=lasting)
                found += fail_recovery(place / "recovery", 1000 * seed + number, fault, lasting=lasting)
                counts[fault] += found["faults"]
    return dict(counts)
