"""Files that other programs wrote, opened so that nothing planted in their place can hang the reader.

A FIFO waits for a writer, a device never ends, a sparse file has any size it likes: only a regular
file is read, and only up to a limit. Every refusal is an OSError, a name with NUL in it included.
Standard library only.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: Path, flags: int = 0) -> BinaryIO:
    """For reading. `flags` are added to those of os.open, such as O_NOFOLLOW. Raises OSError."""
    try:
        # Without O_NONBLOCK the open of a FIFO waits for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | flags)
    except ValueError as error:
        raise OSError(errno.EINVAL, "a name cannot hold NUL", str(path)) from error
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind != stat.S_IFREG:
        os.close(fd)
        code = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(code, f"it is {KINDS.get(kind, 'no file')}, not a regular file", str(path))
    return os.fdopen(fd, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """The whole file. Raises OSError, also if it has more than `limit` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return data


def kind_of(path: Path) -> str:
    """ "file", "folder", or "" for what is not there or is neither. Raises OSError if that cannot be told."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except ValueError as error:
        raise OSError(errno.EINVAL, "a name cannot hold NUL", str(path)) from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else ""
