"""The run file's `features` section: where captured states wait for the trainer. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from paceline.section import Count, Section
from paceline.table import resolve

if TYPE_CHECKING:
    from paceline.features.store import FeatureStore

MEMORY = Path("/dev/shm")  # noqa: S108 (shared memory is what it is for)


class FeaturesSection(Section):
    """Base of each store's section; a subclass names the class to build from it in `component`.

    `budget_mib` and, if given, `budget_samples` limit what the store holds. `directory`: where the bytes,
    or the files that refer to them, lie on this machine.
    """

    component: ClassVar[str]  # "module:class", a FeatureStore with `of_run(section, folder, owner, writer)`
    is_shared: ClassVar[bool] = False  # whether other hosts may reach `directory`, perhaps by another path
    changeable: ClassVar[tuple[str, ...]] = ("directory", "budget_mib", "budget_samples")
    store: str
    directory: Path
    budget_mib: Count = 1024
    budget_samples: Count | None = None

    @property
    def memory(self) -> Path:
        """Where files lie that only processes of this host exchange."""
        return self.directory

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
