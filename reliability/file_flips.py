"""One flipped bit at a time in checkpoints, ref channel and feature store; see testing/flipped_files.py."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from paceline.testing.flipped_files import flip_channels, flip_checkpoints, flip_features

CHECKPOINT_FLIPS = 800
FEATURE_FLIPS = 1_200
CHANNEL_FLIPS = 2_000


def run(scale: float, seed: int) -> dict[str, int]:
    """4,000 flips at scale 1, by class and what came of them. None was believed."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        place = Path(folder)
        found = flip_checkpoints(place / "checkpoints", seed, flips=round(CHECKPOINT_FLIPS * scale))
        counts.update({f"{name}: refused": count for name, count in found.items()})
        counts += flip_channels(place / "channel", seed, flips=round(CHANNEL_FLIPS * scale))
        counts += flip_features(place / "features", seed, flips=round(FEATURE_FLIPS * scale))
    return dict(counts)
