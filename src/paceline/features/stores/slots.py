"""One slot of shared memory: a file with a header page and room for one sample.

Life of a slot: FREE -> (begin) WRITING -> (seal) SEALED -> (free) FREE, with a new generation at each
`begin`: that of the ledger's byte intent, which is never used twice. Only the owner begins and
seals; either process frees. Every word of the header has one writer, and freeing writes the
*generation that is freed*, so a late free by the reader cannot free the sample that has taken the
slot since: the slot is FREE while either freed word equals the generation. The generation is written
twice, the second time with every bit inverted; a slot where the two disagree is FREE as well, since
no ref can name a generation that is not certain. The state word is written last when sealing; readers
look at the header before and after a copy, and the digest judges the bytes, so a torn read is never
trained.
"""

from __future__ import annotations

import os
import stat
from enum import IntEnum
from pathlib import Path

import torch

HEADER_BYTES = 4096
PAGE_BYTES = 4096
MAGIC = int.from_bytes(b"PACESLOT", "little")
VERSION = 2

# Words of 8 bytes, so that each store is one store. The description follows at TEXT.
_MAGIC, _VERSION, _FILE_BYTES, _STATE, _GENERATION, _FREED_BY_OWNER, _FREED_BY_READER = range(7)
_PAYLOAD_BYTES, _DIGEST_HIGH, _DIGEST_LOW, _TEXT_BYTES, _INVERTED_GENERATION = range(7, 12)
_ALL_BITS = (1 << 64) - 1
_TEXT = 128
DESCRIPTION_BYTES_MAX = HEADER_BYTES - _TEXT


class State(IntEnum):
    """FREE is never written: see the module's docstring. The others differ in many bits."""

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

    Raises OSError, and ValueError if it is no regular file of `num_bytes`. Torch maps through
    /proc/self/fd because Python's own mmap keeps a file descriptor open per mapping, and there can
    be thousands of slots.
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or not facts.st_size or facts.st_size % PAGE_BYTES:
            raise ValueError(f"{path} is no file of whole pages")
        if num_bytes not in (None, facts.st_size):
            raise ValueError(f"{path} has {facts.st_size} bytes instead of {num_bytes}")
        return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=facts.st_size, dtype=torch.uint8)
    finally:
        os.close(fd)


def create_file(path: Path, num_bytes: int) -> torch.Tensor:
    """A new file of zeros, mapped. Its pages exist: a full filesystem is an OSError here, no SIGBUS later."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(fd)
    return map_file(path, num_bytes)


class Slot:
    """A mapped slot. `known`: this process's memo of the generation and sample id last seen sealed in it."""

    def __init__(self, path: Path, memory: torch.Tensor) -> None:
        self.path = path
        self.name = path.name
        self.num_bytes = memory.numel()
        self.known: tuple[int, str] | None = None
        content = memory.numpy().data
        self.payload = content[HEADER_BYTES:]
        self._header = content[:HEADER_BYTES]
        self._words = self._header.cast("Q")

    @classmethod
    def create(cls, path: Path, num_bytes: int) -> Slot:
        """A FREE slot at `path`, which appears whole or not at all. Raises OSError."""
        aside = path.with_suffix(".new")
        slot = cls(path, create_file(aside, num_bytes))
        slot._words[_MAGIC], slot._words[_VERSION], slot._words[_FILE_BYTES] = MAGIC, VERSION, num_bytes
        aside.rename(path)
        return slot

    @classmethod
    def open(cls, path: Path) -> Slot:
        """Raises OSError (gone), or ValueError if the file is no whole slot."""
        slot = cls(path, map_file(path))
        if tuple(slot._words[: _FILE_BYTES + 1]) != (MAGIC, VERSION, slot.num_bytes):
            raise ValueError(f"{path} is no slot of {slot.num_bytes} bytes")
        return slot

    @property
    def generation(self) -> int:
        return self._words[_GENERATION]

    @property
    def is_free(self) -> bool:
        words = self._words
        generation = words[_GENERATION]
        return (
            generation == words[_FREED_BY_OWNER]
            or generation == words[_FREED_BY_READER]
            or generation ^ words[_INVERTED_GENERATION] != _ALL_BITS
        )

    @property
    def state(self) -> State:
        return State.FREE if self.is_free else _STATES.get(self._words[_STATE], State.DAMAGED)

    @property
    def description(self) -> bytes:
        """What `begin` wrote, if nothing has damaged it."""
        length = min(self._words[_TEXT_BYTES], DESCRIPTION_BYTES_MAX)
        return bytes(self._header[_TEXT : _TEXT + length])

    @property
    def digest(self) -> str:
        return f"{self._words[_DIGEST_HIGH]:016x}{self._words[_DIGEST_LOW]:016x}"

    @property
    def payload_bytes(self) -> int:
        return self._words[_PAYLOAD_BYTES]

    def begin(self, description: bytes, payload_bytes: int, generation: int = 0) -> None:
        """Take a FREE slot for a new sample. A crash from here to `seal` leaves it WRITING.

        `generation`: any but those the slot had before; 0 counts on from the last one.
        """
        assert self.is_free
        assert len(description) <= DESCRIPTION_BYTES_MAX
        assert payload_bytes <= len(self.payload)
        words = self._words
        words[_STATE] = State.WRITING
        generation = generation or (words[_GENERATION] + 1) & _ALL_BITS or 1
        if generation in (words[_FREED_BY_OWNER], words[_FREED_BY_READER]):
            words[_FREED_BY_OWNER] = words[_FREED_BY_READER] = 0  # left by another ledger's run
        words[_GENERATION] = generation
        # From this store on the slot is no longer FREE.
        words[_INVERTED_GENERATION] = generation ^ _ALL_BITS
        words[_PAYLOAD_BYTES] = payload_bytes
        words[_TEXT_BYTES] = len(description)
        self._header[_TEXT : _TEXT + len(description)] = description

    def seal(self, digest: str) -> None:
        assert self.state is State.WRITING
        self._words[_DIGEST_HIGH], self._words[_DIGEST_LOW] = int(digest[:16], 16), int(digest[16:], 16)
        self._words[_STATE] = State.SEALED

    def free(self, generation: int, *, by_owner: bool) -> None:
        """Idempotent; without effect if the slot holds a later generation by now.

        The pages stay with the file for the next sample: fresh ones cost 5-10x.
        """
        self._words[_FREED_BY_OWNER if by_owner else _FREED_BY_READER] = generation
