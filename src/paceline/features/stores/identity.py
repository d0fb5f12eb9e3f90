"""The identity file of a shared store: its uuid, the machine's boot, and counters that its writers share."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch

from paceline.features.ownership import HALF_MADE, IDENTITY, OWNER_FILE, WRITER_LOCK
from paceline.features.stores.refusals import no_room, other_format
from paceline.features.stores.slots import PAGE_BYTES, create_file, map_file

_MAGIC = int.from_bytes(b"PACESTOR", "little")
_FORMAT = 1
_MAGIC_WORD, _FORMAT_WORD, LAYOUT, _UNUSED, NEXT_SERIAL = range(5)
_BOOT = slice(64, 100)
_UUID = slice(128, 160)


def open_identity(directory: Path) -> torch.Tensor | None:
    """The mapped identity file; None if the directory is empty, half created, or of another boot.

    Raises StoreError if the directory holds something else.
    """
    try:
        identity = map_file(directory / IDENTITY, PAGE_BYTES)
    except FileNotFoundError:
        names = {path.name for path in directory.iterdir()} - {OWNER_FILE, WRITER_LOCK}
        foreign = [name for name in sorted(names) if not HALF_MADE.fullmatch(name)]
        if foreign:
            raise other_format(directory, f"it holds {foreign[0]!r} but no identity file") from None
        return None
    except (OSError, ValueError) as error:
        raise other_format(directory, f"its identity file cannot be read ({error})") from error
    header = identity.numpy().data
    words = header.cast("Q")
    if words[_MAGIC_WORD] != _MAGIC or words[_FORMAT_WORD] != _FORMAT:
        raise other_format(directory, f"its identity file is not of format {_FORMAT}")
    return identity if bytes(header[_BOOT]) == _boot_id() else None


def create_identity(directory: Path) -> torch.Tensor:
    """A new store's identity file, mapped. Raises StoreError."""
    aside = directory / f"{IDENTITY}.new"
    aside.unlink(missing_ok=True)
    try:
        identity = create_file(aside, PAGE_BYTES)
    except OSError as error:
        raise no_room(directory, PAGE_BYTES, error) from error
    header = identity.numpy().data
    words = header.cast("Q")
    words[_MAGIC_WORD], words[_FORMAT_WORD], words[NEXT_SERIAL] = _MAGIC, _FORMAT, 1
    header[_BOOT] = _boot_id()
    header[_UUID] = uuid.uuid4().hex.encode()
    aside.rename(directory / IDENTITY)
    return identity


def uuid_in(identity: memoryview) -> str:
    return bytes(identity[_UUID]).decode(errors="replace")


def inode_of(directory: Path) -> int:
    """Inode of the identity file, which no other file gets while it is mapped; 0 if there is none."""
    try:
        return (directory / IDENTITY).stat().st_ino
    except FileNotFoundError:
        return 0


def _boot_id() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
