"""The store on a real Mooncake master gives the answers of the one on the stand-in.

`make test-mooncake` runs it, in a network namespace of its own; the fast suite does not.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mooncake.store
import pytest

from paceline.features.sample_files import key_of
from paceline.features.settings import MooncakeSection
from paceline.features.store import FeatureStore
from paceline.features.stores.mooncake.link import Link, connect
from paceline.features.stores.mooncake.store import MooncakeFeatureStore
from paceline.testing.feature_store_suite import MIB, FeatureStoreSuite, assert_same, feature_ref, features
from paceline.testing.mooncake_master import MooncakeMaster, is_alone
from paceline.types import SampleRef

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeMaster]:
    assert is_alone(), "Mooncake's clients listen on all addresses: run this by `make test-mooncake`"
    found = MooncakeMaster(tmp_path_factory.mktemp("master"))
    yield found
    found.kill()


@pytest.fixture(scope="module")
def link(master: MooncakeMaster) -> Iterator[Link]:
    found = connect(MooncakeSection(master=master.address), 64, patience_s=10.0)
    yield found
    found.close()


class TestMooncakeFeatureStore(FeatureStoreSuite):
    made = 0

    @pytest.fixture(autouse=True)
    def _link(self, link: Link, tmp_path: Path) -> Iterator[None]:
        self.link, self.prefix = link, tmp_path.name
        yield
        link.remove_like("^")

    def make(self, budget_bytes: int = 8 * MIB) -> FeatureStore:
        self.made += 1
        return MooncakeFeatureStore(
            self.link, f"{self.prefix}.{self.made}", budget_bytes=budget_bytes, owner=True
        )

    def flip_bit(self, store: FeatureStore, ref: SampleRef) -> None:
        assert isinstance(store, MooncakeFeatureStore)
        number = next(iter(ref.feature_keys.values())).partition("/")[0]
        key = f"{store._store}/{number}-{key_of(ref.sample_id)}"
        content = ctypes.create_string_buffer(MIB)
        self.link.register(ctypes.addressof(content), MIB)
        [size] = self.link.get([key], [ctypes.addressof(content)], [MIB])
        content[0] = bytes([content.raw[0] ^ 1])
        self.link.put(key, ctypes.addressof(content), size)
        self.link.unregister(ctypes.addressof(content))


def test_objects_in_the_memory_of_another_process_outlive_their_producer(master: MooncakeMaster) -> None:
    """`mooncake_client`, as docs/operations.md starts it, and `segment_mib: 0`."""
    section = MooncakeSection(master=master.address, segment_mib=0, budget_mib=8)
    with gives_memory(master):
        producer, consumer = connect(section), connect(section)
        writer = MooncakeFeatureStore(producer, "run", budget_bytes=8 * MIB, owner=True)
        reader = MooncakeFeatureStore(consumer, "run", budget_bytes=8 * MIB, owner=False)
        refs = [feature_ref(f"s{n}", writer.put(f"s{n}", features(n), generation=n + 1)) for n in range(3)]
        writer.close()
        into = reader.buffer(MIB)
        for number, sample in enumerate(reader.get_many(refs, into=into)):
            assert isinstance(sample, dict)
            assert_same(sample, features(number))
        into.free()
        reader.destroy()
        reader.close()


@contextmanager
def gives_memory(master: MooncakeMaster) -> Iterator[None]:
    """A process that gives 64 MiB."""
    program = Path(mooncake.store.__file__).with_name("mooncake_client")
    options = ["--host=127.0.0.1", f"--master_server_address={master.address}", "--protocol=tcp"]
    options += ["--metadata_server=P2PHANDSHAKE", "--global_segment_size=64MB"]
    looker = connect(MooncakeSection(master=master.address))
    quiet = subprocess.DEVNULL
    with subprocess.Popen([str(program), *options], stdout=quiet, stderr=quiet) as process:
        content = ctypes.create_string_buffer(64)
        looker.register(ctypes.addressof(content), 64)
        looker.put("is there room", ctypes.addressof(content), 64)  # it waits
        looker.remove(["is there room"])
        yield
        process.kill()
    looker.unregister(ctypes.addressof(content))
    looker.close()
