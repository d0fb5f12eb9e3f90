"""One flipped bit in shared memory at a time: header, payload, identity. Never other tensors."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

from paceline.errors import FeatureCorruptError, FeatureMissingError, StoreError
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing.feature_store_suite import assert_same, feature_ref, features

USED = (range(96), range(128, 420), range(4096, 4096 + 640))  # words, description, the sample's bytes


def flip_bits(folder: Path, seed: int, *, flips: int) -> Counter[str]:
    """`get` returns exactly what was put, or says that it is missing or damaged."""
    rng = random.Random(seed)
    owner = SharedMemoryFeatureStore(folder, budget_bytes=8 << 20, owner=True)
    ref = feature_ref("a", owner.put("a", features(1), generation=7))
    counts: Counter[str] = Counter()
    for _ in range(flips):
        path = rng.choice(sorted(folder.iterdir()))
        used = [part for part in USED if part.stop <= path.stat().st_size]
        place, mask = rng.choice(rng.choice(used)), 1 << rng.randrange(8)
        _flip(path, place, mask)
        try:
            reader = SharedMemoryFeatureStore(folder, budget_bytes=8 << 20, owner=False)
            assert_same(reader.get(ref), features(1))
            counts["harmless"] += 1
        except (FeatureMissingError, FeatureCorruptError, StoreError):
            counts[f"found in {path.name.split('-')[0]}"] += 1
        _flip(path, place, mask)
    owner.destroy()
    return counts


def _flip(path: Path, place: int, mask: int) -> None:
    fd = os.open(path, os.O_RDWR)
    [byte] = os.pread(fd, 1, place)
    os.pwrite(fd, bytes([byte ^ mask]), place)
    os.close(fd)
