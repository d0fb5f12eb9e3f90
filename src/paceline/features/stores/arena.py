"""The directory of one shared store: its identity file, and the slots of its writers.

A slot belongs to the writer that created it: its name says which, and only that writer puts samples into it.
So a writer that was held up and goes on late can spoil no other writer's sample. What concerns several
writers happens in turns (ownership.py): taking, making and removing slots, and freeing another writer's.

The identity file names the store (uuid) and the machine's boot, and counts the slots that writers created or
unlinked. A process lists the directory only if that count differs from the one it last saw; a writer counts
after each change, so a process with an equal count is up to date. Slot names are never used twice. The
identity is created first and removed last, and every file is written under a temporary name and renamed, so
the next start recognises what a crash left.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from paceline.errors import StoreFullError
from paceline.features.ownership import (
    HALF_MADE,
    SLOT_NAME,
    WriterLock,
    hold,
    is_private,
    make_private,
    write_as,
)
from paceline.features.store import Written
from paceline.features.stores.identity import (
    LAYOUT,
    NEXT_SERIAL,
    create_identity,
    inode_of,
    open_identity,
    uuid_in,
)
from paceline.features.stores.refusals import missing, no_room, replaced
from paceline.features.stores.slots import PAGE_BYTES, Part, Slot, slot_bytes
from paceline.types import SampleRef

SLOTS_MAX = 32_768  # half of the mappings that Linux allows a process (vm.max_map_count)
UNSEALED = ""  # the id of a sample that a neighbour is writing, or that it left half-written


class Arena:
    """The slots of one store. Created by `own` or `attach`."""

    def __init__(self, directory: Path, identity: torch.Tensor, inode: int, budget_bytes: int) -> None:
        header = identity.numpy().data
        self.uri = f"shm://{directory.name}/{uuid_in(header)}"
        self.slots: dict[str, Slot] = {}
        self._held = hold(directory)  # as long as this object lives
        self._directory = directory
        self._words = header.cast("Q")
        self._inode = inode
        self._budget_bytes = budget_bytes
        self._seen_layout = -1
        # Of a writer only: its lock, and its own slots by size, and by the sample that it put there last.
        self._lock: WriterLock | None = None
        self._prefix = ""
        self._rings: defaultdict[int, deque[Slot]] = defaultdict(deque)
        self._slot_of: dict[str, Slot] = {}

    @classmethod
    def own(cls, directory: Path, budget_bytes: int, writer: int) -> Arena:
        """Become this writer: create the store or join it, and reclaim what this writer's dead process left.

        Raises StoreError if another process is this writer.
        """
        try:
            make_private(directory)
            lock = write_as(directory, writer)
        except OSError as error:
            raise no_room(directory, PAGE_BYTES, error) from error
        with lock.turn():
            identity = open_identity(directory)
            if identity is None:
                # Half created, or of an earlier boot of the machine, after which any part may be lost.
                for name in _slot_names(directory):
                    (directory / name).unlink()
                identity = create_identity(directory)
            for path in directory.iterdir():
                if HALF_MADE.fullmatch(path.name):
                    path.unlink()
            arena = cls(directory, identity, inode_of(directory), budget_bytes)
            arena._lock = lock
            arena._prefix = f"slot-{writer}-" if writer else "slot-"
            arena._take_over()
        return arena

    @classmethod
    def attach(cls, directory: Path, budget_bytes: int) -> Arena | None:
        """Open the store as the reader; None while the directory holds no store."""
        if not is_private(directory):
            return None
        # Read the inode before the open: if the file is replaced in between, `is_current` shows it.
        inode = inode_of(directory)
        identity = open_identity(directory)
        return None if identity is None else cls(directory, identity, inode, budget_bytes)

    def is_current(self) -> bool:
        """Whether the directory still holds this store, not a newer one or none."""
        return inode_of(self._directory) == self._inode != 0

    # -- every process -----------------------------------------------------------------------

    def refresh(self) -> None:
        """List the directory if slots were made or removed: open new slots and unmap unlinked ones."""
        layout = self._words[LAYOUT]
        if layout == self._seen_layout:
            return
        names = set(_slot_names(self._directory))
        for name in self.slots.keys() - names:
            self._forget(name)
        for name in names - self.slots.keys():
            try:
                self.slots[name] = Slot.open(self._directory / name)
            except (OSError, ValueError):
                continue  # unlinked since, or damaged: no ref to it can be read
        self._seen_layout = layout

    def locate(self, ref: SampleRef) -> tuple[Slot, int]:
        """The slot and the generation that the ref's keys name. Raises FeatureMissingError."""
        name, _, rest = next(iter(ref.feature_keys.values()), "").partition("/")
        generation = rest.partition("/")[0]
        slot = self.slots.get(name)
        if slot is None or not generation.isdecimal():
            raise missing(ref, f"there is no slot {name!r}")
        return slot, int(generation)

    def free(self, written: Iterable[Written]) -> None:
        """Free the slots of these samples and generations (0: any generation)."""
        wanted = set(written)
        if self._lock is None:
            self._free(wanted)
            return
        with self._lock.turn():  # meanwhile no neighbour puts a later sample into a slot that is judged here
            self._free(wanted)

    def _free(self, wanted: set[Written]) -> None:
        for slot, generation in self._matching(wanted):
            slot.free(generation, self._part(slot))

    def _matching(self, wanted: set[Written]) -> Iterator[tuple[Slot, int]]:
        generations = {generation for _, generation in wanted}
        for slot in self.slots.values():
            generation = slot.generation
            if slot.is_free or not generations & {0, generation}:
                continue
            sealed = slot.sealed()
            if sealed is None:  # half-written or damaged: the generation alone says whose bytes these are
                is_wanted = generation in generations
            else:
                is_wanted = not wanted.isdisjoint(((sealed[0], 0), (sealed[0], generation)))
            if is_wanted:
                yield slot, generation

    def _part(self, slot: Slot) -> Part:
        if self._lock is None:
            return Part.READER
        return Part.OWNER if self._is_own(slot.name) else Part.NEIGHBOUR

    def _is_own(self, name: str) -> bool:
        return bool(self._prefix) and name.rpartition("-")[0] + "-" == self._prefix

    def _forget(self, name: str) -> None:
        slot = self.slots.pop(name)
        if slot in self._rings[slot.num_bytes]:
            self._rings[slot.num_bytes].remove(slot)
        self._forget_sample(slot)

    # -- a writer ------------------------------------------------------------------------------

    def find(self, sample_id: str) -> Slot | None:
        """This writer's slot of the sample, whatever the state of its header; None if there is none."""
        slot = self._slot_of.get(sample_id)
        return None if slot is None or slot.is_free else slot

    def remember(self, slot: Slot, sample_id: str) -> None:
        """This writer has put the sample into the slot."""
        self._forget_sample(slot)
        slot.sample_id, self._slot_of[sample_id] = sample_id, slot

    def _forget_sample(self, slot: Slot) -> None:
        if self._slot_of.get(slot.sample_id) is slot:
            del self._slot_of[slot.sample_id]

    def written(self) -> list[Written]:
        """Sample ids and generations of what is sealed and whole, and UNSEALED ones of neighbours."""
        found = []
        for slot in self.slots.values():
            generation, sealed = slot.generation, slot.sealed()
            if sealed is not None:
                found.append((sealed[0], generation))
            elif not slot.is_free and not self._is_own(slot.name):
                found.append((UNSEALED, generation))
        return found

    def begin(self, description: bytes, payload_bytes: int, generation: int) -> Slot:
        """A slot of this writer, WRITING this sample. Raises StoreFullError, and then changes nothing."""
        assert self._lock is not None
        size = slot_bytes(payload_bytes)
        with self._lock.turn():  # meanwhile no neighbour removes the slot
            if not self.is_current():
                raise replaced(self._directory)
            slot = self._free_slot(size)
            if slot is None:
                self._make_room(size)
                slot = self._create(size)
            slot.begin(description, payload_bytes, generation)
        return slot

    def _free_slot(self, size: int) -> Slot | None:
        ring = self._rings[size]
        for _ in range(len(ring)):
            slot = ring[0]
            ring.rotate(-1)  # samples are mostly freed in order, so the next free slot is near
            if slot.is_free:
                if slot.path.exists():
                    return slot
                self._forget(slot.name)  # another process deleted it: the reader could not open it
        return None

    def _take_over(self) -> None:
        for name in sorted(_slot_names(self._directory)):
            try:
                slot = self.slots[name] = Slot.open(self._directory / name)
            except ValueError:
                (self._directory / name).unlink()
                continue
            if not self._is_own(name):
                continue
            self._rings[slot.num_bytes].append(slot)
            if (sealed := slot.sealed()) is None:
                slot.free(slot.generation, Part.OWNER)
            else:
                self.remember(slot, sealed[0])
        self._seen_layout = self._words[LAYOUT]
        last = max((int(name.rpartition("-")[2]) for name in self.slots), default=0)
        self._words[NEXT_SERIAL] = max(self._words[NEXT_SERIAL], last + 1)
        self._count_change()  # a dead writer may not have counted its last change

    def _make_room(self, size: int) -> None:
        """Unlink free slots until a new one fits the budget: first this writer's, of other size classes."""
        self.refresh()
        allocated = sum(slot.num_bytes for slot in self.slots.values())
        free = [slot for slot in self.slots.values() if slot.is_free]
        in_use = len(self.slots) - len(free)
        excess = allocated + size - self._budget_bytes
        if excess > sum(slot.num_bytes for slot in free) or in_use >= SLOTS_MAX:
            raise StoreFullError(
                f"A slot of {size} bytes does not fit in {self._directory}: {in_use} slots "
                f"are in use (at most {SLOTS_MAX}), {allocated} of {self._budget_bytes} bytes allocated.",
                why="A sample's bytes stay until a durable checkpoint covers it.",
                next="raise features.budget_mib, or lower checkpoint.interval_steps.",
            )
        for slot in sorted(free, key=lambda slot: not self._is_own(slot.name)):
            if excess <= 0 and len(self.slots) < SLOTS_MAX:
                break
            slot.path.unlink(missing_ok=True)
            self._forget(slot.name)
            self._count_change()
            excess -= slot.num_bytes

    def _create(self, size: int) -> Slot:
        serial = self._words[NEXT_SERIAL]
        self._words[NEXT_SERIAL] = serial + 1
        try:
            slot = Slot.create(self._directory / f"{self._prefix}{serial:08d}", size)
        except OSError as error:
            raise no_room(self._directory, size, error) from error
        self.slots[slot.name] = slot
        self._rings[slot.num_bytes].append(slot)
        self._count_change()
        return slot

    def _count_change(self) -> None:
        """For the others; this process knows its own change, if it was up to date before it."""
        is_up_to_date = self._seen_layout == self._words[LAYOUT]
        self._words[LAYOUT] += 1
        if is_up_to_date:
            self._seen_layout = self._words[LAYOUT]


def _slot_names(directory: Path) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if SLOT_NAME.fullmatch(name)]  # noqa: PTH208 (often)
    except FileNotFoundError:
        return []
