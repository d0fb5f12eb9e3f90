"""One flipped bit at a time in checkpoints and in shared memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

from paceline.testing import broken_folders, flipped_slots

FLIPS = 2_000  # in each


def run(scale: float, seed: int) -> dict[str, int]:
    """`FLIPS * scale` flips in a checkpoint's files and as many in shared memory. None was believed."""
    with tempfile.TemporaryDirectory() as folder:
        counts = broken_folders.flip_bits(Path(folder) / "checkpoints", seed, flips=round(FLIPS * scale))
        counts += flipped_slots.flip_bits(Path(folder) / "features", seed, flips=round(FLIPS * scale))
    return dict(counts)
