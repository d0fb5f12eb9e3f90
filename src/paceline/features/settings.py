"""The run file's `features` section: where captured states wait for the trainer. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator

from paceline.section import Count, Section
from paceline.table import resolve

if TYPE_CHECKING:
    from paceline.features.store import FeatureStore

SEGMENT_MIB_MIN = 16  # Mooncake takes no less
MEMORY = Path("/dev/shm")  # noqa: S108 (shared memory is what it is for)


class FeaturesSection(Section):
    """Base of each store's section; a subclass names the class to build from it in `component`.

    `budget_mib` and, if given, `budget_samples` limit what the store holds. `directory`: where the bytes,
    or the files that refer to them, lie on this machine.
    """

    component: ClassVar[str]  # "module:class", a FeatureStore with `of_run(section, folder, owner, writer)`
    is_shared: ClassVar[bool] = False  # whether other hosts may reach the features
    in_directory: ClassVar[bool] = True  # whether they lie in `directory`
    changeable: ClassVar[tuple[str, ...]] = ("directory", "budget_mib", "budget_samples")
    store: str
    directory: Path
    budget_mib: Count = 1024
    budget_samples: Count | None = None

    @property
    def memory(self) -> Path:
        """Where files lie that only processes of this host exchange."""
        return self.directory

    @property
    def where(self) -> str:
        """The place, for people."""
        return str(self.directory)

    @property
    def ends_with_producers(self) -> bool:
        """Whether what a producer has stored is gone when its process has ended."""
        return False

    def host_mib(self, producers: int) -> int:
        """How much memory of a host the features take, of so many producers on it."""
        del producers
        return self.budget_mib

    def build(self, folder: Path, *, owner: bool, writer: int = 0) -> FeatureStore:
        """The run's store in `folder`, which lies below `directory`; `owner`: for a producer, whose number is
        `writer`."""
        store: FeatureStore = resolve(self.component).of_run(self, folder, owner=owner, writer=writer)
        return store


class SharedMemorySection(FeaturesSection):
    """Slots in a folder of shared memory, for producer and consumer on one machine."""

    component: ClassVar[str] = "paceline.features.stores.shm:SharedMemoryFeatureStore"
    store: Literal["shm"] = "shm"
    directory: Path = MEMORY


class DirectorySection(FeaturesSection):
    """A file for each sample in a folder that every host of the run reaches, such as a network filesystem.

    `directory` has no default; it may be mounted in another place on each host. On one host it may be a
    disk, so that features outlive a reboot.
    """

    component: ClassVar[str] = "paceline.features.stores.directory:DirectoryFeatureStore"
    is_shared: ClassVar[bool] = True
    store: Literal["directory"] = "directory"

    @property
    def memory(self) -> Path:
        return MEMORY


def _host_and_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or "/" in text:
        raise ValueError("an address is host:port, such as 10.0.0.5:50051")
    return text


def _segment(mib: int) -> int:
    if mib and mib < SEGMENT_MIB_MIN:
        raise ValueError(f"Mooncake takes no memory of less than {SEGMENT_MIB_MIN} MiB (0 is none)")
    return mib


class MooncakeSection(FeaturesSection):
    """An object for each sample in memory that processes of any host give to a Mooncake master.

    `master`: host:port of a `mooncake_master`. `segment_mib`: the memory that each producer gives; None: the
    budget and a quarter, so that the budget stays below the master's watermark (0.9) whichever producers die;
    0: none, because `mooncake_client` processes give it. `host`: this host's name or address for the others;
    None: the one from which the master is reached. `protocol`, `devices`: tcp, or rdma and its devices by
    name. `metadata`: Mooncake's metadata server. `answers`: a folder that every host mounts, for the tokens
    of answers; an engine that does not repeat its bits needs it on several hosts. `directory` holds what only
    processes of this host exchange.
    """

    component: ClassVar[str] = "paceline.features.stores.mooncake:MooncakeFeatureStore"
    is_shared: ClassVar[bool] = True
    in_directory: ClassVar[bool] = False
    changeable: ClassVar[tuple[str, ...]] = (
        *FeaturesSection.changeable,
        *("master", "segment_mib", "host", "protocol", "devices", "metadata", "answers"),
    )
    store: Literal["mooncake"] = "mooncake"
    directory: Path = MEMORY
    master: Annotated[str, AfterValidator(_host_and_port)]
    segment_mib: Annotated[int, AfterValidator(_segment)] | None = None
    host: str | None = None
    protocol: Literal["tcp", "rdma"] = "tcp"
    devices: str = ""
    metadata: str = "P2PHANDSHAKE"
    answers: Path | None = None

    @property
    def given_mib(self) -> int:
        """The memory that each producer gives."""
        if self.segment_mib is None:
            return max(SEGMENT_MIB_MIN, self.budget_mib * 5 // 4)
        return self.segment_mib

    @property
    def where(self) -> str:
        given = f"{self.given_mib} MiB of each producer" if self.given_mib else "memory of others"
        return f"{given} at the master {self.master}"

    @property
    def ends_with_producers(self) -> bool:
        return self.given_mib > 0

    def host_mib(self, producers: int) -> int:
        return self.given_mib * producers
