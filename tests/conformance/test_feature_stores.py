"""Every feature store runs the one suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.errors import FeatureCorruptError
from paceline.features.sample_files import key_of
from paceline.features.store import FeatureStore
from paceline.features.stores.directory import DirectoryFeatureStore
from paceline.features.stores.files import FileFeatureStore
from paceline.features.stores.mooncake.link import Link
from paceline.features.stores.mooncake.store import MooncakeFeatureStore
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.features.stores.slots import HEADER_BYTES
from paceline.testing.feature_store_suite import MIB, FeatureStoreSuite, assert_same, feature_ref, features
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.testing.mooncake_stand_in import ReplicateConfig, StandInClient, StandInMaster
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


class TestFileFeatureStore(FeatureStoreSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder, self.made = tmp_path, 0

    def make(self, budget_bytes: int = 8 * MIB) -> FeatureStore:
        self.made += 1
        return FileFeatureStore(self.folder / f"store-{self.made}", budget_bytes=budget_bytes)

    def flip_bit(self, store: FeatureStore, ref: SampleRef) -> None:
        assert isinstance(store, FileFeatureStore)
        path = store._held[ref.sample_id].path
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    def test_another_store_of_the_folder_reads_what_was_put(self) -> None:
        """Also under another name of the folder; what a kill has left half-written is swept away."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features(1), generation=4))
        moved = self.folder / "moved"
        (self.folder / "store-1").rename(moved)
        (moved / "x.part").write_bytes(b"half")
        again = FileFeatureStore(moved, budget_bytes=8 * MIB)
        assert_same(again.get(ref), features(1))
        assert again.written() == [("a", 4)]
        assert list(moved.glob("*.part")) == []
        assert again.put("b", features(2)).keys["input_ids"].startswith("5/")

    def test_a_torn_file_is_not_listed(self) -> None:
        """So the ledger learns that its sample is lost."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features(1), generation=4))
        path = next((self.folder / "store-1").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
        again = FileFeatureStore(self.folder / "store-1", budget_bytes=8 * MIB)
        assert again.written() == []
        with pytest.raises(FeatureCorruptError):
            again.get(ref)
        assert_same(again.get(feature_ref("a", again.put("a", features(1), generation=5))), features(1))


class TestDirectoryFeatureStore(FeatureStoreSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder, self.made = tmp_path, 0

    def make(self, budget_bytes: int = 8 * MIB) -> FeatureStore:
        self.made += 1
        folder = self.folder / f"store-{self.made}"
        return DirectoryFeatureStore(folder, budget_bytes=budget_bytes, owner=True, sleep=lambda _: None)

    def flip_bit(self, store: FeatureStore, ref: SampleRef) -> None:
        assert isinstance(store, DirectoryFeatureStore)
        [path] = [found.path for found in store._files.list() if found.key == key_of(ref.sample_id)]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


class TestMooncakeFeatureStore(FeatureStoreSuite):
    """On a stand-in that `make test-mooncake` holds to a real master, which it gives the same suite."""

    @pytest.fixture(autouse=True)
    def _master(self) -> None:
        self.master, self.made = StandInMaster(), 0
        self.link = Link(
            StandInClient(self.master, "here", 64 * MIB), ReplicateConfig(with_hard_pin=True), "m:1"
        )

    def make(self, budget_bytes: int = 8 * MIB) -> FeatureStore:
        self.made += 1
        return MooncakeFeatureStore(self.link, f"run.{self.made}", budget_bytes=budget_bytes, owner=True)

    def flip_bit(self, store: FeatureStore, ref: SampleRef) -> None:
        [key] = [key for key in self.master.objects if key_of(ref.sample_id) in key]
        self.master.objects[key].content[0] ^= 1
