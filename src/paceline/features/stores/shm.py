"""The feature store in shared memory: one writer (the producer) and one reader (the consumer).

Files in a private directory, e.g. under /dev/shm, mapped by both. Invariants: a sealed sample's
bytes never change before it is freed; a ref whose sample was freed is FeatureMissing even if its
slot serves another sample by now; `get` returns bytes that match the ref's digest or raises. Who
may be the owner is decided outside (a role lock); within a process any thread may call. A crash
of either process at any moment leaves sealed samples and slots that the next owner reclaims;
a crash of the machine loses the store, which shows as missing features.

`get` copies, once, and digests the copy while it is in the cache. `view` copies nothing, but the bytes are
read twice, for the digest and by the caller, and in between the owner may reuse the slot; it says so
only when it ends, so training, which cannot be taken back, uses `get`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from paceline.crashpoints import reach
from paceline.errors import StoreError
from paceline.features import codec
from paceline.features.landing import Landing
from paceline.features.store import Sealed, Usage, is_kept
from paceline.features.stores.arena import Arena, remove
from paceline.features.stores.refusals import corrupt, missing, stale
from paceline.features.stores.slots import DESCRIPTION_BYTES_MAX, Slot, State
from paceline.types import SampleRef


class _Found(NamedTuple):
    """Where a ref's sample should lie, and what should be said there."""

    slot: Slot
    generation: int
    layout: codec.Layout
    description: bytes


class SharedMemoryFeatureStore:
    def __init__(self, directory: Path, *, budget_bytes: int, owner: bool) -> None:
        """`budget_bytes` bounds the slot files, free ones included; only the owner's counts.

        The reader may come before the owner has made the store: nothing lies there then. Raises
        StoreError if the directory is not ours or holds something else.
        """
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._owner = owner
        self._closed = False
        self._lock = threading.RLock()
        self._landing = Landing()
        self._arena = Arena.own(directory, budget_bytes) if owner else Arena.attach(directory, budget_bytes)

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        with self._lock:
            arena = self._owned("put")
            slot = arena.find(sample_id)
            if slot is not None:
                sealed = _sealed(arena, slot)
                if sealed is not None and generation in (0, slot.generation):
                    return sealed
                if sealed is not None and generation < slot.generation:
                    raise stale(sample_id, generation, slot.generation)
                slot.free(slot.generation, by_owner=True)
            layout = codec.layout_of_tensors(sample_id, tensors)
            description = _checked(sample_id, codec.describe(sample_id, layout))
            slot = arena.allocate(layout.num_bytes)
            slot.begin(description, layout.num_bytes, generation)
            try:
                digest = codec.write(layout, description, tensors, slot.payload)
                reach("features.put.before_seal")
                slot.seal(digest)
            except BaseException:
                slot.free(slot.generation, by_owner=True)
                raise
            arena.note_sealed(slot, sample_id)
            return Sealed(arena.uri, _keys(slot, layout), dict(layout.specs), layout.num_bytes, digest)

    def get(self, ref: SampleRef) -> dict[str, Any]:
        found = self._find(ref)
        layout, payload = found.layout, found.slot.payload
        # The owner may free and reuse the slot before or while it is copied. The header afterwards says
        # so; it is the digest that judges the copy.
        tensors, digest = codec.read(layout, found.description, payload, self._landing.take(layout.num_bytes))
        self._judge(ref, found, digest)
        return tensors

    @contextmanager
    def view(self, ref: SampleRef) -> Iterator[dict[str, Any]]:
        found = self._find(ref)
        tensors, digest = codec.look(found.layout, found.description, found.slot.payload)
        self._judge(ref, found, digest)
        try:
            yield tensors
        except Exception:
            _check_header(ref, found)  # What failed may have failed over other bytes.
            raise
        # Generations never return, so a header that still says sealed never said otherwise.
        _check_header(ref, found)

    def abort(
        self,
        sample_id: str,
        reason: str = "",  # noqa: ARG002 (the protocol's)
        *,
        generation: int | None = None,
    ) -> None:
        with self._lock:
            arena = self._attached()
            slot = arena.find(sample_id) if arena is not None else None
            if slot is not None and slot.known is not None and generation in (None, slot.known[0]):
                slot.free(slot.known[0], by_owner=self._owner)

    def sweep(self, keep: Collection[str], *, before: int | None = None) -> list[str]:
        """Also frees slots whose header is damaged; their sample ids are not known."""
        swept = []
        with self._lock:
            arena = self._owned("sweep")
            for slot in arena.slots.values():
                if slot.is_free:
                    continue
                sealed = _sealed(arena, slot)
                if sealed is not None and slot.known is not None:
                    if is_kept(keep, before, slot.known[1], slot.generation):
                        continue
                    swept.append(slot.known[1])
                slot.free(slot.generation, by_owner=True)
        return swept

    def sample_ids(self) -> list[str]:
        with self._lock:
            arena = self._owned("list samples")
            held = [slot for slot in arena.slots.values() if not slot.is_free]
            return [s.known[1] for s in held if _sealed(arena, s) is not None and s.known is not None]

    def newest_generation(self) -> int:
        """Of damaged slots too: they are swept like others."""
        with self._lock:
            slots = self._owned("list generations").slots.values()
            return max((slot.generation for slot in slots if not slot.is_free), default=0)

    def usage(self) -> Usage:
        """Resident: slots being written or sealed, whole, with header and slack. Free slots are not."""
        with self._lock:
            arena = self._attached()
            slots = [] if arena is None else list(arena.slots.values())
        resident = [slot.num_bytes for slot in slots if not slot.is_free]
        return Usage(sum(resident), len(resident), self._budget_bytes)

    def close(self) -> None:
        with self._lock:
            self._closed, self._arena = True, None

    def destroy(self) -> None:
        """Either process may; the other finds its features missing."""
        self.close()
        remove(self._directory)

    def _find(self, ref: SampleRef) -> _Found:
        layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
        with self._lock:
            slot, generation = self._locate(ref)
        if ref.feature_keys != _keys(slot, layout, generation):
            raise corrupt(ref, "its keys are not those of its tensors")
        if layout.num_bytes > len(slot.payload):
            raise corrupt(ref, f"{slot.name} has no room for its tensors")
        return _Found(slot, generation, layout, codec.describe(ref.sample_id, layout))

    def _judge(self, ref: SampleRef, found: _Found, digest: str) -> None:
        """Raise unless bytes with this digest, read just now, are the ref's; then remember the slot."""
        slot = found.slot
        _check_header(ref, found)
        if not digest == slot.digest == ref.metadata.get("digest"):
            raise corrupt(ref, f"the header says digest {slot.digest} and the bytes have {digest}")
        with self._lock:
            if self._arena is not None and self._arena.slots.get(slot.name) is slot:
                self._arena.learn(slot, found.generation, ref.sample_id)

    def _attached(self) -> Arena | None:
        """The arena, up to date; None for a reader that finds no store."""
        if self._closed:
            raise StoreError(
                f"The feature store in {self._directory} was closed by this process.",
                why="Its memory is no longer mapped here.",
                next="open it again.",
            )
        if not self._owner:
            if self._arena is None or not self._arena.is_current():
                self._arena = Arena.attach(self._directory, self._budget_bytes)
            if self._arena is not None:
                self._arena.refresh()
        return self._arena

    def _owned(self, verb: str) -> Arena:
        arena = self._attached()
        if arena is None or not self._owner:
            raise StoreError(
                f"This process may not {verb} in {self._directory}: it opened the store as a reader.",
                why="One writer keeps every sealed sample whole without a lock between processes.",
                next=f"{verb} in the producer, which opens the store with owner=True.",
            )
        return arena

    def _locate(self, ref: SampleRef) -> tuple[Slot, int]:
        """The slot and generation that the ref's keys name."""
        arena = self._attached()
        if arena is None or arena.uri != ref.feature_store_uri:
            raise missing(ref, f"{self._directory} holds {arena.uri if arena else 'no store'}")
        name, _, rest = next(iter(ref.feature_keys.values()), "").partition("/")
        generation = rest.partition("/")[0]
        slot = arena.slots.get(name)
        if slot is None or not generation.isdecimal():
            raise missing(ref, f"there is no slot {name!r}")
        return slot, int(generation)


def _keys(slot: Slot, layout: codec.Layout, generation: int | None = None) -> dict[str, str]:
    """`slot/generation/offset` of every tensor: a later sample in the slot has another generation."""
    start = f"{slot.name}/{slot.generation if generation is None else generation}/"
    return {place.name: start + place.key for place in layout.places}


def _sealed(arena: Arena, slot: Slot) -> Sealed | None:
    """What `put` returned for the sample in the slot; None if the slot's header is damaged."""
    if slot.state is not State.SEALED:
        return None
    try:
        sample_id, layout = codec.undescribe(slot.description)
    except ValueError:
        return None
    if slot.known != (slot.generation, sample_id) or layout.num_bytes != slot.payload_bytes:
        return None
    return Sealed(arena.uri, _keys(slot, layout), dict(layout.specs), layout.num_bytes, slot.digest)


def _checked(sample_id: str, description: bytes) -> bytes:
    if len(description) > DESCRIPTION_BYTES_MAX:
        raise StoreError(
            f"The id and specs of sample {sample_id[:64]!r} take {len(description)} bytes.",
            why=f"A slot's header holds {DESCRIPTION_BYTES_MAX}.",
            next="use fewer tensors, or shorter names and ids.",
        )
    return description


def _check_header(ref: SampleRef, found: _Found) -> None:
    """Raise unless the slot holds this ref's sample, sealed."""
    slot, generation, layout, description = found
    state = slot.state
    if slot.generation != generation or state in (State.FREE, State.WRITING):
        raise missing(ref, f"{slot.name} generation {generation} was freed")
    if state is not State.SEALED or layout.num_bytes != slot.payload_bytes:
        raise corrupt(ref, f"the header of {slot.name} is not whole")
    if slot.description != description:
        raise corrupt(ref, f"{slot.name} describes other tensors")
