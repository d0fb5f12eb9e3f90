"""Every feature store runs the one suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.features.store import FeatureStore
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.features.stores.slots import HEADER_BYTES
from paceline.testing.feature_store_suite import MIB, FeatureStoreSuite
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.types import SampleRef


class TestInMemoryFeatureStore(FeatureStoreSuite):
    def make(self, budget_bytes: int = 8 * MIB) -> FeatureStore:
        return InMemoryFeatureStore(budget_bytes)

    def flip_bit(self, store: FeatureStore, ref: SampleRef) -> None:
        assert isinstance(store, InMemoryFeatureStore)
        store._held[ref.sample_id].payload[0] ^= 1


class TestSharedMemoryFeatureStore(FeatureStoreSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> Iterator[None]:
        self.folder, self.made = tmp_path, 0
        yield
        for number in range(self.made):
            # A store that was destroyed in the test has left no directory.
            SharedMemoryFeatureStore(tmp_path / f"store-{number}", budget_bytes=0, owner=False).destroy()

    def make(self, budget_bytes: int = 8 * MIB) -> FeatureStore:
        directory = self.folder / f"store-{self.made}"
        self.made += 1
        return SharedMemoryFeatureStore(directory, budget_bytes=budget_bytes, owner=True)

    def flip_bit(self, store: FeatureStore, ref: SampleRef) -> None:
        assert isinstance(store, SharedMemoryFeatureStore)
        slot = next(iter(ref.feature_keys.values())).partition("/")[0]
        path = store._directory / slot
        with path.open("r+b") as file:
            file.seek(HEADER_BYTES)
            byte = file.read(1)[0]
            file.seek(HEADER_BYTES)
            file.write(bytes([byte ^ 1]))
