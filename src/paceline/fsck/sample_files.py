"""The checker's own reader of a feature folder that hosts share: a safetensors file for each sample.

Format: features/stores/sample_format.py. Only headers are read. Files that change meanwhile are left out.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from paceline.fsck.artefacts import Slot
from paceline.fsck.files import open_file

MARK = "store-id"
MARK_BYTES_MAX = 64
HEADER_BYTES_MAX = 1 << 20
NONSENSE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def is_shared(folder: Path) -> bool:
    return (folder / MARK).is_file()


def store_in(folder: Path) -> str:
    """What identifies the store in the folder; "" if there is none."""
    try:
        with open_file(folder / MARK, os.O_NOFOLLOW) as file:
            return file.read(MARK_BYTES_MAX).decode(errors="replace")
    except OSError:
        return ""


def files_in_use(folder: Path) -> tuple[list[Slot], list[str]]:
    """The samples' files, whole and half-written, and the names of those that are neither."""
    found, damaged = [], []
    for path in sorted(folder.glob("[0-9]*/*-*.*")):
        name, number = path.name, path.name.partition("-")[0]
        if not number.isdecimal() or path.suffix not in (".safetensors", ".part"):
            continue
        if path.suffix == ".part":
            found.append(Slot(name, int(number), sealed=False, sample_id=None))
            continue
        try:
            sample_id = _sample_in(path, int(number))
        except FileNotFoundError:
            continue  # freed since
        except OSError:
            sample_id = None
        if sample_id is None:
            damaged.append(name)
        else:
            found.append(Slot(name, int(number), sealed=True, sample_id=sample_id))
    return found, damaged


def _sample_in(path: Path, generation: int) -> str | None:
    """The sample's id; None if the file is cut off, or not what its name says. Raises OSError."""
    with open_file(path, os.O_NOFOLLOW) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = file.read(length) if 0 < length <= HEADER_BYTES_MAX else b""
    try:
        tensors = json.loads(text)
        sample_id, number = json.loads(tensors.pop("__metadata__")["sample"])
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except NONSENSE:
        return None
    is_whole = number == generation and size == 8 + length + end
    return sample_id if is_whole and isinstance(sample_id, str) else None
