"""Both ends of a shared memory feature store, for its tests."""

from __future__ import annotations

from pathlib import Path

from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing.feature_store_suite import MIB, feature_ref, features
from paceline.types import SampleRef


def owner_of(directory: Path, budget_bytes: int = 8 * MIB, writer: int = 0) -> SharedMemoryFeatureStore:
    return SharedMemoryFeatureStore(directory, budget_bytes=budget_bytes, owner=True, writer=writer)


def reader_of(directory: Path) -> SharedMemoryFeatureStore:
    return SharedMemoryFeatureStore(directory, budget_bytes=8 * MIB, owner=False)


def put(store: SharedMemoryFeatureStore, number: int) -> SampleRef:
    """Seal `features(number)` as sample s<number>."""
    return feature_ref(f"s{number}", store.put(f"s{number}", features(number)))


def slot_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("slot-*"))
