"""The run file's `features` section: where captured states wait for the trainer. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from paceline.section import Count, Section
from paceline.table import resolve

if TYPE_CHECKING:
    from paceline.features.store import FeatureStore


class FeaturesSection(Section):
    """Base of each store's section; a subclass names the class to build from it in `component`.

    `budget_mib` and, if given, `budget_samples` limit what the store holds. `directory`: where the bytes,
    or the files that refer to them, lie on this machine.
    """

    component: ClassVar[str]  # "module:class", a FeatureStore with `of_run(section, folder, owner, writer)`
    changeable: ClassVar[tuple[str, ...]] = ("directory", "budget_mib", "budget_samples")
    store: str
    directory: Path
    budget_mib: Count = 1024
    budget_samples: Count | None = None

    def build(self, folder: Path, *, owner: bool, writer: int = 0) -> FeatureStore:
        """The run's store in `folder`, which lies below `directory`; `owner`: for a producer, whose number is
        `writer`."""
        store: FeatureStore = resolve(self.component).of_run(self, folder, owner=owner, writer=writer)
        return store


class SharedMemorySection(FeaturesSection):
    """Slots in a folder of shared memory, for producer and consumer on one machine."""

    component: ClassVar[str] = "paceline.features.stores.shm:SharedMemoryFeatureStore"
    store: Literal["shm"] = "shm"
    directory: Path = Path("/dev/shm")  # noqa: S108 (shared memory is what it is for)
