"""Power failures under the checkpoints by the thousand; see testing/broken_folders.py."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from paceline.testing.broken_folders import FAULTS, fail_calls, lose_power

HISTORIES = 25


def run(scale: float, seed: int) -> dict[str, int]:
    """Images after every file operation of `HISTORIES * scale` histories, and every n-th fault."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(round(HISTORIES * scale)):
            place = Path(folder) / f"power-{number}"
            counts.update(lose_power(place, 1000 * seed + number, writes=8, per_step=10))
        for error in FAULTS:
            for call in ("open", "write", "fsync"):
                counts.update(fail_calls(Path(folder) / "faults", seed, error, calls=(call,)))
    return dict(counts)
