"""Opens files of other programs so that a FIFO or a device in their place cannot hang the reader.

A FIFO waits for a writer, a device never ends, and a sparse file can have any size. So only regular
files are read, and only up to a limit. Every refusal is an OSError, also for a name that holds NUL.
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
    """Open for reading, with `flags` of os.open added, such as O_NOFOLLOW. Raises OSError."""
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
    """The whole content. Raises OSError, also if the file has more than `limit` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return data


def kind_of(path: Path) -> str:
    """ "file", "folder", or "" for anything else or nothing. Raises OSError if the kind cannot be read."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except ValueError as error:
        raise OSError(errno.EINVAL, "a name cannot hold NUL", str(path)) from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else ""
