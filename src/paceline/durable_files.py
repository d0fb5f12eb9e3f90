"""Writes files that are whole or absent, even after power loss: write aside, sync, rename, sync.

A name appears only after all its bytes are on the disk, and the rename is on the disk when the call
returns. If fsync fails the call fails, because the content of the disk is unknown then.
Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

FileContent = bytes | memoryview  # a memoryview of bytes


def write_file(path: Path, data: FileContent) -> None:
    """Write a new file that only its owner may read. Raises OSError.

    Its bytes are on the disk on return; its name needs `sync_folder`.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_whole(fd, data)
    finally:
        os.close(fd)


def write_whole(fd: int, data: FileContent) -> None:
    """Write all of `data`, however short single writes are, and sync the file. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.fsync(fd)


def make_folder(path: Path) -> None:
    """Create the folder if it is missing, and sync its name and those of the folders above it.

    It syncs existing folders too: the process that made them may have died before it could. Raises OSError.
    """
    path.mkdir(parents=True, exist_ok=True)
    device = path.stat().st_dev
    for folder in path.absolute().parents:
        if folder.stat().st_dev != device or not os.access(folder, os.R_OK):
            break  # a mount point, or another user's folder
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Sync the names that were made, renamed or removed in `folder`. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Replace the file: after a crash at any moment it has its old bytes or these. Raises OSError."""
    aside = path.with_name(path.name + ".new")
    write_file(aside, data)
    aside.rename(path)
    sync_folder(path.parent)
