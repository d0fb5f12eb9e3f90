"""Files that are whole or not there, also after power loss: written aside, synced, renamed, synced.

A name appears only after every byte behind it is on the disk, and the rename itself is on the disk
when the call returns. An error of fsync is an error of the call: what the disk holds is unknown then.
Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

FileContent = bytes | memoryview  # a memoryview of bytes


def write_file(path: Path, data: FileContent) -> None:
    """A new file with these bytes, for its owner alone. Raises OSError.

    It is on the disk on return; its name needs `sync_folder`.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """`path` is a folder on return; its name, and those of the folders above, are on the disk.

    Whoever made them may have died before it could see to that. Raises OSError.
    """
    path.mkdir(parents=True, exist_ok=True)
    device = path.stat().st_dev
    for folder in path.absolute().parents:
        if folder.stat().st_dev != device or not os.access(folder, os.R_OK):
            break  # a mount point, or a folder whose owner saw to it
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Names made, renamed or removed in `folder` are on the disk on return. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """`path` has either its old bytes or these, whenever the machine stops. Raises OSError."""
    aside = path.with_name(path.name + ".new")
    write_file(aside, data)
    aside.rename(path)
    sync_folder(path.parent)
