"""One flipped bit in the ledger at a time; see testing/broken_files.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

from paceline.testing.broken_files import flip_bits

FLIPS = 2_000


def run(scale: float, seed: int) -> dict[str, int]:
    """`FLIPS * scale` flips; how many were found and how many had no effect. None was believed."""
    with tempfile.TemporaryDirectory() as folder:
        return dict(flip_bits(Path(folder), seed, flips=round(FLIPS * scale)))
