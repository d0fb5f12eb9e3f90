"""One slot of shared memory: a file with a header page and room for one sample.

Life of a slot: FREE -> (write) WRITING -> SEALED -> (free) FREE. Each `write` has a new generation, that
of the ledger's byte intent, which is never used twice. Only the slot's owner, the writer that created it,
writes; all may free it. Every word of the header has one writer at a time. To free a slot, a process writes
the *freed generation* into the word of its `Part`, and the slot is FREE while any of these words equals the
slot's generation: a late free cannot free a newer sample in the slot. The generation is written twice, the
second time with every bit inverted; a slot where the two disagree is FREE as well, since no ref can name an
uncertain generation.
Sealing writes the state word last. Readers check the header before and after a copy, and the digest
verifies the bytes, so torn reads are never trained.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from paceline.crashpoints import reach
from paceline.errors import StoreError
from paceline.features import codec
from paceline.features.ownership import OTHERS_MAY_WRITE
from paceline.features.stores.refusals import corrupt, missing
from paceline.types import SampleRef

HEADER_BYTES = 4096
PAGE_BYTES = 4096
MAGIC = int.from_bytes(b"PACESLOT", "little")
VERSION = 2

# Words of 8 bytes, so that the CPU writes each in one piece. The description follows at TEXT.
_MAGIC, _VERSION, _FILE_BYTES, _STATE, _GENERATION, _FREED_BY_OWNER, _FREED_BY_READER = range(7)
_PAYLOAD_BYTES, _DIGEST_HIGH, _DIGEST_LOW, _TEXT_BYTES = range(7, 11)
_INVERTED_GENERATION, _FREED_BY_NEIGHBOUR = range(11, 13)
_ALL_BITS = (1 << 64) - 1
_TEXT = 128
DESCRIPTION_BYTES_MAX = HEADER_BYTES - _TEXT


class Part(IntEnum):
    """What a process is to a slot that it frees; the value is the word of the header that it writes."""

    OWNER = _FREED_BY_OWNER
    READER = _FREED_BY_READER
    NEIGHBOUR = _FREED_BY_NEIGHBOUR  # another writer of the store, in its turn


class State(IntEnum):
    """FREE is never written (see the module's docstring). The others differ in many bits."""

    FREE = 0
    WRITING = 0x57524954494E4721
    SEALED = 0x5345414C45442E2E
    DAMAGED = 1


_STATES = {int(state): state for state in (State.WRITING, State.SEALED)}


def slot_bytes(payload_bytes: int) -> int:
    """Bytes of the slot that a payload occupies: header, and slack up to the size class.

    Classes grow by about 1.25, so beyond a few pages the slack is below a quarter.
    """
    size = HEADER_BYTES + PAGE_BYTES
    while size < HEADER_BYTES + payload_bytes:
        size = -(-size * 5 // (4 * PAGE_BYTES)) * PAGE_BYTES
    return size


def map_file(path: Path, num_bytes: int | None = None) -> torch.Tensor:
    """The file as shared, writable memory: uint8 [file size]; unmapped when no tensor uses it.

    Raises OSError, and ValueError if it is not a regular file of `num_bytes` that only this user may write.
    A FIFO or a link that another user planted cannot hang it. Torch maps through /proc/self/fd because
    Python's own mmap keeps a file descriptor open per mapping, and there can be thousands of slots.
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or not facts.st_size or facts.st_size % PAGE_BYTES:
            raise ValueError(f"{path} does not consist of whole pages")
        if facts.st_uid != os.geteuid() or facts.st_mode & OTHERS_MAY_WRITE:
            raise ValueError(f"{path} is not private to this user")
        if num_bytes not in (None, facts.st_size):
            raise ValueError(f"{path} has {facts.st_size} bytes instead of {num_bytes}")
        return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=facts.st_size, dtype=torch.uint8)
    finally:
        os.close(fd)


def create_file(path: Path, num_bytes: int) -> torch.Tensor:
    """A new, mapped file of zeros. Its pages are allocated: a full filesystem is an OSError, not a SIGBUS."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(fd)
    return map_file(path, num_bytes)


def description_of(sample_id: str, layout: codec.Layout) -> bytes:
    """The sample's description for a slot's header. Raises StoreError if it does not fit."""
    description = codec.describe(sample_id, layout)
    if len(description) > DESCRIPTION_BYTES_MAX:
        raise StoreError(
            f"The id and specs of sample {sample_id[:64]!r} take {len(description)} bytes.",
            why=f"A slot's header holds {DESCRIPTION_BYTES_MAX}.",
            next="use fewer tensors, or shorter names and ids.",
        )
    return description


class Slot:
    """A mapped slot. `sample_id`: what its owner put there last."""

    def __init__(self, path: Path, memory: torch.Tensor) -> None:
        self.path = path
        self.name = path.name
        self.num_bytes = memory.numel()
        self.sample_id = ""
        content = memory.numpy().data
        self.payload = content[HEADER_BYTES:]
        self._header = content[:HEADER_BYTES]
        self._words = self._header.cast("Q")

    @classmethod
    def create(cls, path: Path, num_bytes: int) -> Slot:
        """A new FREE slot at `path`; the file appears whole or not at all. Raises OSError."""
        aside = path.with_suffix(".new")
        slot = cls(path, create_file(aside, num_bytes))
        slot._words[_MAGIC], slot._words[_VERSION], slot._words[_FILE_BYTES] = MAGIC, VERSION, num_bytes
        aside.rename(path)
        return slot

    @classmethod
    def open(cls, path: Path) -> Slot:
        """Raises OSError if the file is gone, ValueError if it is not a whole slot."""
        slot = cls(path, map_file(path))
        if tuple(slot._words[: _FILE_BYTES + 1]) != (MAGIC, VERSION, slot.num_bytes):
            raise ValueError(f"{path} is not a slot of {slot.num_bytes} bytes")
        return slot

    @property
    def generation(self) -> int:
        return self._words[_GENERATION]

    @property
    def is_free(self) -> bool:
        words = self._words
        generation = words[_GENERATION]
        return (
            any(generation == words[part] for part in Part)
            or generation ^ words[_INVERTED_GENERATION] != _ALL_BITS
        )

    @property
    def state(self) -> State:
        return State.FREE if self.is_free else _STATES.get(self._words[_STATE], State.DAMAGED)

    @property
    def description(self) -> bytes:
        """The description that `write` put there, unless it was damaged since."""
        length = min(self._words[_TEXT_BYTES], DESCRIPTION_BYTES_MAX)
        return bytes(self._header[_TEXT : _TEXT + length])

    @property
    def digest(self) -> str:
        return f"{self._words[_DIGEST_HIGH]:016x}{self._words[_DIGEST_LOW]:016x}"

    @property
    def payload_bytes(self) -> int:
        return self._words[_PAYLOAD_BYTES]

    def begin(self, description: bytes, payload_bytes: int, generation: int = 0) -> None:
        """Take this FREE slot for a sample: it is WRITING until `fill` has sealed it.

        `generation`: one that the slot never had before; 0: the next after its last one.
        """
        assert self.is_free
        assert len(description) <= DESCRIPTION_BYTES_MAX
        assert payload_bytes <= len(self.payload)
        words = self._words
        words[_STATE] = State.WRITING
        generation = generation or (words[_GENERATION] + 1) & _ALL_BITS or 1
        if any(generation == words[part] for part in Part):  # words of another ledger's run
            for part in Part:
                words[part] = 0
        words[_GENERATION] = generation
        # From this store on the slot is no longer FREE.
        words[_INVERTED_GENERATION] = generation ^ _ALL_BITS
        words[_PAYLOAD_BYTES] = payload_bytes
        words[_TEXT_BYTES] = len(description)
        self._header[_TEXT : _TEXT + len(description)] = description

    def fill(self, description: bytes, layout: codec.Layout, tensors: Mapping[str, Any]) -> str:
        """Write the tensors and seal them; returns their digest. After an error the slot is FREE again."""
        try:
            digest = codec.write(layout, description, tensors, self.payload)
            reach("features.put.before_seal")
            self._seal(digest)
        except BaseException:
            self.free(self.generation, Part.OWNER)
            raise
        return digest

    def _seal(self, digest: str) -> None:
        """If the slot was freed meanwhile, because the intent was revoked, it stays FREE."""
        self._words[_DIGEST_HIGH], self._words[_DIGEST_LOW] = int(digest[:16], 16), int(digest[16:], 16)
        self._words[_STATE] = State.SEALED

    def read(self, ref: SampleRef, generation: int) -> dict[str, Any]:
        """A copy of the ref's tensors, written under `generation`.

        The owner may free and reuse the slot meanwhile: the header after the copy shows that, and the digest
        verifies the copy. Raises FeatureMissingError or FeatureCorruptError.
        """
        layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
        if ref.feature_keys != self.keys(layout, generation):
            raise corrupt(ref, "its keys are not those of its tensors")
        if layout.num_bytes > len(self.payload):
            raise corrupt(ref, f"{self.name} has no room for its tensors")
        description = codec.describe(ref.sample_id, layout)
        tensors, digest = codec.read(layout, description, self.payload)
        state = self.state
        if self.generation != generation or state in (State.FREE, State.WRITING):
            raise missing(ref, f"{self.name} generation {generation} was freed")
        if state is not State.SEALED or layout.num_bytes != self.payload_bytes:
            raise corrupt(ref, f"the header of {self.name} is not whole")
        if self.description != description:
            raise corrupt(ref, f"{self.name} describes other tensors")
        if not digest == self.digest == ref.metadata.get("digest"):
            raise corrupt(ref, f"the header says digest {self.digest} and the bytes have {digest}")
        return tensors

    def sealed(self) -> tuple[str, codec.Layout] | None:
        """The sealed sample and its layout; None if there is none or the header is damaged."""
        if self.state is not State.SEALED:
            return None
        try:
            sample_id, layout = codec.undescribe(self.description)
        except ValueError:
            return None
        is_whole = layout.num_bytes == self.payload_bytes <= len(self.payload)
        return (sample_id, layout) if is_whole else None

    def keys(self, layout: codec.Layout, generation: int | None = None) -> dict[str, str]:
        """Each tensor's key, `slot/generation/offset`; a later sample in the slot has another generation."""
        start = f"{self.name}/{self.generation if generation is None else generation}/"
        return {place.name: start + place.key for place in layout.places}

    def free(self, generation: int, part: Part) -> None:
        """Free this generation. Idempotent; no effect if the slot holds a later generation by now.

        The file keeps its pages for the next sample: fresh pages cost 5-10x.
        """
        self._words[part] = generation
