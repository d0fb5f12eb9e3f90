"""The directory of one shared store: its identity file, and its slots.

The identity file names the store (uuid) and the machine's boot, and counts the slots that the owner created
or unlinked. The reader lists the directory only if that count differs from the one it last saw; the owner
counts after each change, so a reader with an equal count is up to date. Slot names are never used twice. The
identity is created first and removed last, and every file is written under a temporary name and renamed, so
the next start recognises what a crash left.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections import defaultdict, deque
from collections.abc import Iterable
from pathlib import Path

import torch

from paceline.errors import StoreError, StoreFullError
from paceline.features.ownership import (
    HALF_MADE,
    IDENTITY,
    OWNER_FILE,
    SLOT_NAME,
    WRITER_LOCK,
    FolderLock,
    hold,
    is_private,
    make_private,
    write_alone,
)
from paceline.features.store import Written
from paceline.features.stores.refusals import missing
from paceline.features.stores.slots import PAGE_BYTES, Slot, create_file, map_file, slot_bytes
from paceline.types import SampleRef

SLOTS_MAX = 32_768  # half of the mappings that Linux allows a process (vm.max_map_count)

_MAGIC = int.from_bytes(b"PACESTOR", "little")
_FORMAT = 1
_MAGIC_WORD, _FORMAT_WORD, _LAYOUT, _UNUSED, _NEXT_SERIAL = range(5)
_BOOT = slice(64, 100)
_UUID = slice(128, 160)


class Arena:
    """The slots of one store. Created by `own` or `attach`."""

    def __init__(self, directory: Path, identity: torch.Tensor, inode: int, budget_bytes: int) -> None:
        header = identity.numpy().data
        self.uri = f"shm://{directory.name}/{bytes(header[_UUID]).decode(errors='replace')}"
        self.slots: dict[str, Slot] = {}
        self._held = hold(directory)  # as long as this object lives
        self._alone: FolderLock | None = None  # the owner's, as long
        self._directory = directory
        self._identity = directory / IDENTITY
        self._words = header.cast("Q")
        self._inode = inode
        self._budget_bytes = budget_bytes
        # Only the owner fills these: its slots by size, and by the sample that it put there last.
        self._rings: defaultdict[int, deque[Slot]] = defaultdict(deque)
        self._slot_of: dict[str, Slot] = {}
        self._seen_layout = -1

    @classmethod
    def own(cls, directory: Path, budget_bytes: int) -> Arena:
        """Become the only writer: create the store, or take it over and reclaim what a dead owner left.

        Raises StoreError if another process is its writer.
        """
        try:
            make_private(directory)
            alone = write_alone(directory)
        except OSError as error:
            raise _no_room(directory, PAGE_BYTES, error) from error
        identity = _open_identity(directory)
        if identity is None:
            # Half created, or of an earlier boot of the machine, after which any part may be lost.
            for path in _slot_paths(directory):
                path.unlink()
            identity = _create_identity(directory)
        for path in directory.iterdir():
            if HALF_MADE.fullmatch(path.name):
                path.unlink()
        arena = cls(directory, identity, _inode(directory / IDENTITY), budget_bytes)
        arena._alone = alone
        arena._take_over()
        return arena

    @classmethod
    def attach(cls, directory: Path, budget_bytes: int) -> Arena | None:
        """Open the store as the reader; None while the directory holds no store."""
        if not is_private(directory):
            return None
        # Read the inode before the open: if the file is replaced in between, `is_current` shows it.
        inode = _inode(directory / IDENTITY)
        identity = _open_identity(directory)
        return None if identity is None else cls(directory, identity, inode, budget_bytes)

    def is_current(self) -> bool:
        """Whether the directory still holds this store, not a newer one or none."""
        return _inode(self._identity) == self._inode != 0

    # -- both processes ---------------------------------------------------------------------

    def refresh(self) -> None:
        """The reader lists the directory: it opens new slots and unmaps unlinked ones."""
        layout = self._words[_LAYOUT]
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

    def find(self, sample_id: str) -> Slot | None:
        """For the owner: the sample's slot, whatever the state of its header; None if there is none."""
        slot = self._slot_of.get(sample_id)
        return None if slot is None or slot.is_free else slot

    def remember(self, slot: Slot, sample_id: str) -> None:
        """The owner has put the sample into the slot."""
        self._forget_sample(slot)
        slot.sample_id, self._slot_of[sample_id] = sample_id, slot

    def _forget_sample(self, slot: Slot) -> None:
        if self._slot_of.get(slot.sample_id) is slot:
            del self._slot_of[slot.sample_id]

    def locate(self, ref: SampleRef) -> tuple[Slot, int]:
        """The slot and the generation that the ref's keys name. Raises FeatureMissingError."""
        name, _, rest = next(iter(ref.feature_keys.values()), "").partition("/")
        generation = rest.partition("/")[0]
        slot = self.slots.get(name)
        if slot is None or not generation.isdecimal():
            raise missing(ref, f"there is no slot {name!r}")
        return slot, int(generation)

    def free(self, written: Iterable[Written], *, by_owner: bool) -> None:
        """Free the slots of these samples and generations (0: any generation)."""
        wanted = set(written)
        generations = {generation for _, generation in wanted}
        for slot in self.slots.values():
            generation = slot.generation
            if slot.is_free or not generations & {0, generation}:
                continue
            sealed = slot.sealed()
            if sealed is None:  # a damaged header: the generation alone says whose bytes these are
                is_wanted = generation in generations
            else:
                is_wanted = not wanted.isdisjoint(((sealed[0], 0), (sealed[0], generation)))
            if is_wanted:
                slot.free(generation, by_owner=by_owner)

    def _forget(self, name: str) -> None:
        slot = self.slots.pop(name)
        if slot in self._rings[slot.num_bytes]:
            self._rings[slot.num_bytes].remove(slot)
        self._forget_sample(slot)

    # -- the owner --------------------------------------------------------------------------

    def written(self) -> list[tuple[str, int]]:
        """Sample ids and generations of what is sealed and whole."""
        sealed = [(slot, slot.sealed()) for slot in self.slots.values()]
        return [(found[0], slot.generation) for slot, found in sealed if found is not None]

    def allocate(self, payload_bytes: int) -> Slot:
        """A FREE slot that takes the payload. Raises StoreFullError, and then nothing has changed."""
        size = slot_bytes(payload_bytes)
        ring = self._rings[size]
        for _ in range(len(ring)):
            slot = ring[0]
            ring.rotate(-1)  # samples are mostly freed in order, so the next free slot is near
            if slot.is_free:
                if slot.path.exists():
                    return slot
                self._forget(slot.name)  # another process deleted it: the reader could not open it
        self._make_room(size)
        return self._create(size)

    def _take_over(self) -> None:
        for path in sorted(_slot_paths(self._directory)):
            try:
                slot = Slot.open(path)
            except ValueError:
                path.unlink()
                continue
            self._add(slot)
            if (sealed := slot.sealed()) is None:
                slot.free(slot.generation, by_owner=True)
            else:
                self.remember(slot, sealed[0])
        last = max((int(name.removeprefix("slot-")) for name in self.slots), default=0)
        self._words[_NEXT_SERIAL] = max(self._words[_NEXT_SERIAL], last + 1)
        self._words[_LAYOUT] += 1  # the dead owner may not have counted its last change

    def _make_room(self, size: int) -> None:
        """Unlink free slots (all of other size classes) until a new one fits the budget."""
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
        for slot in free:
            if excess <= 0 and len(self.slots) < SLOTS_MAX:
                break
            slot.path.unlink(missing_ok=True)
            self._forget(slot.name)
            self._words[_LAYOUT] += 1
            excess -= slot.num_bytes

    def _create(self, size: int) -> Slot:
        serial = self._words[_NEXT_SERIAL]
        self._words[_NEXT_SERIAL] = serial + 1
        try:
            slot = Slot.create(self._directory / f"slot-{serial:08d}", size)
        except OSError as error:
            raise _no_room(self._directory, size, error) from error
        self._add(slot)
        self._words[_LAYOUT] += 1
        return slot

    def _add(self, slot: Slot) -> None:
        self.slots[slot.name] = slot
        self._rings[slot.num_bytes].append(slot)


def _slot_paths(directory: Path) -> list[Path]:
    return [directory / name for name in _slot_names(directory)]


def _slot_names(directory: Path) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if SLOT_NAME.fullmatch(name)]  # noqa: PTH208 (often)
    except FileNotFoundError:
        return []


def _open_identity(directory: Path) -> torch.Tensor | None:
    """The mapped identity file; None if the directory is empty, half created, or of another boot.

    Raises StoreError if the directory holds something else.
    """
    try:
        identity = map_file(directory / IDENTITY, PAGE_BYTES)
    except FileNotFoundError:
        names = {path.name for path in directory.iterdir()} - {OWNER_FILE, WRITER_LOCK}
        foreign = [name for name in sorted(names) if not HALF_MADE.fullmatch(name)]
        if foreign:
            raise _other_format(directory, f"it holds {foreign[0]!r} but no identity file") from None
        return None
    except (OSError, ValueError) as error:
        raise _other_format(directory, f"its identity file cannot be read ({error})") from error
    header = identity.numpy().data
    words = header.cast("Q")
    if words[_MAGIC_WORD] != _MAGIC or words[_FORMAT_WORD] != _FORMAT:
        raise _other_format(directory, f"its identity file is not of format {_FORMAT}")
    return identity if bytes(header[_BOOT]) == _boot_id() else None


def _inode(identity: Path) -> int:
    """Inode of the identity file, which no other file gets while it is mapped; 0 if there is none."""
    try:
        return identity.stat().st_ino
    except FileNotFoundError:
        return 0


def _create_identity(directory: Path) -> torch.Tensor:
    aside = directory / f"{IDENTITY}.new"
    aside.unlink(missing_ok=True)
    try:
        identity = create_file(aside, PAGE_BYTES)
    except OSError as error:
        raise _no_room(directory, PAGE_BYTES, error) from error
    header = identity.numpy().data
    words = header.cast("Q")
    words[_MAGIC_WORD], words[_FORMAT_WORD], words[_NEXT_SERIAL] = _MAGIC, _FORMAT, 1
    header[_BOOT] = _boot_id()
    header[_UUID] = uuid.uuid4().hex.encode()
    aside.rename(directory / IDENTITY)
    return identity


def _boot_id() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def _no_room(directory: Path, size: int, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(
            f"No {size} bytes are left on the filesystem of {directory}.",
            why="The budget is larger than the shared memory that this machine or container gives.",
            next="lower features.budget_mib, or give more (`docker run --shm-size=8g`, `df -h /dev/shm`).",
        )
    return StoreError(
        f"No file of {size} bytes can be created in {directory} ({error}).",
        why="Features cannot be stored; the directory was removed in use or cannot be written.",
        next="check features.directory and run the same command again.",
    )


def _other_format(directory: Path, because: str) -> StoreError:
    return StoreError(
        f"{directory} is not a feature store of this version: {because}.",
        why="Files that this version does not know must not be read or overwritten.",
        next="finish that run with the version that started it, or choose another run.name; "
        f"`rm -r {directory}` discards it (lost features are captured again).",
    )
