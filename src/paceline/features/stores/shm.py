"""The feature store in shared memory: its writers (the producers of this host) and a reader (the consumer).

All map files in a private directory, e.g. under /dev/shm. Invariants: a sealed sample's bytes never
change before it is freed; a ref whose sample was freed is FeatureMissing even if another sample has its
slot by now; `get` returns bytes that match the ref's digest, or raises. Writers are numbered, and each is one
process at a time: it writes into slots of its own, and a new process frees what its dead one left
half-written. Within a process any thread may call. A crash of any process leaves sealed samples, and slots
that the writer's next process reclaims; after a crash of the machine all features are missing.

`get` copies once and digests the copy while it is in the CPU cache. A slot knows its header and payload, the
arena knows which slot lies where, and this file orders their calls.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paceline.errors import StoreError
from paceline.features import codec
from paceline.features.ownership import remove
from paceline.features.settings import FeaturesSection
from paceline.features.store import Sealed, Usage, Written
from paceline.features.stores.arena import Arena
from paceline.features.stores.refusals import elsewhere, stale
from paceline.features.stores.slots import Part, Slot, description_of
from paceline.types import SampleRef


class SharedMemoryFeatureStore:
    def __init__(self, directory: Path, *, budget_bytes: int, owner: bool, writer: int = 0) -> None:
        """`budget_bytes` bounds the slot files of all writers together, free ones included.

        `writer`: the number of this one, if it is an owner of slots. A reader may open the store before a
        writer has created it, and finds nothing. Raises StoreError if the directory is another user's, holds
        something else, or has another process as this writer.
        """
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._owner = owner
        self._closed = False
        self._lock = threading.RLock()
        self._arena = (
            Arena.own(directory, budget_bytes, writer) if owner else Arena.attach(directory, budget_bytes)
        )

    @classmethod
    def of_run(
        cls, section: FeaturesSection, folder: Path, *, owner: bool, writer: int = 0
    ) -> SharedMemoryFeatureStore:
        return cls(folder, budget_bytes=section.budget_mib << 20, owner=owner, writer=writer)

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        with self._lock:
            arena = self._owned("put")
            slot = arena.find(sample_id)
            if slot is not None:
                sealed = slot.sealed()
                if sealed is not None and sealed[0] == sample_id:
                    if generation in (0, slot.generation):
                        return _answer(arena, slot, sealed[1], slot.digest)
                    if generation < slot.generation:
                        raise stale(sample_id, generation, slot.generation)
                slot.free(slot.generation, Part.OWNER)
            layout = codec.layout_of_tensors(sample_id, tensors)
            description = description_of(sample_id, layout)
            slot = arena.begin(description, layout.num_bytes, generation)
            digest = slot.fill(description, layout, tensors)
            arena.remember(slot, sample_id)
            return _answer(arena, slot, layout, digest)

    def get(self, ref: SampleRef) -> dict[str, Any]:
        with self._lock:
            arena = self._attached()
            if arena is None or arena.uri != ref.feature_store_uri:
                raise elsewhere(ref, f"{arena.uri if arena else 'no store'} in {self._directory}")
            slot, generation = arena.locate(ref)
        return slot.read(ref, generation)

    def free(self, written: Iterable[Written]) -> None:
        with self._lock:
            arena = self._attached()
            if arena is not None:
                arena.free(written)

    def written(self) -> list[Written]:
        """All bytes in the store; the id of a neighbour's sample that is not sealed is not known yet."""
        with self._lock:
            return self._owned("list samples").written()

    def usage(self) -> Usage:
        """Resident bytes: those of slots that are not free, header and slack included."""
        with self._lock:
            arena = self._attached()
            slots = [] if arena is None else list(arena.slots.values())
        resident = [slot.num_bytes for slot in slots if not slot.is_free]
        return Usage(sum(resident), len(resident), self._budget_bytes)

    def close(self) -> None:
        with self._lock:
            self._closed, self._arena = True, None

    def destroy(self) -> None:
        """Either process may call this; the other then finds its features missing."""
        self.close()
        remove(self._directory)

    def _attached(self) -> Arena | None:
        """The arena, refreshed; None for a reader that finds no store."""
        if self._closed:
            raise StoreError(
                f"The feature store in {self._directory} was closed by this process.",
                why="Its memory is no longer mapped here.",
                next="open it again.",
            )
        if not self._owner and (self._arena is None or not self._arena.is_current()):
            self._arena = Arena.attach(self._directory, self._budget_bytes)
        if self._arena is not None:
            self._arena.refresh()
        return self._arena

    def _owned(self, verb: str) -> Arena:
        arena = self._attached()
        if arena is None or not self._owner:
            raise StoreError(
                f"This process may not {verb} in {self._directory}: it opened the store as a reader.",
                why="Only the producer that owns a slot writes to it, so sealed samples stay whole.",
                next=f"{verb} in a producer, which opens the store with owner=True.",
            )
        return arena


def _answer(arena: Arena, slot: Slot, layout: codec.Layout, digest: str) -> Sealed:
    return Sealed(arena.uri, slot.keys(layout), dict(layout.specs), slot.num_bytes, digest)
