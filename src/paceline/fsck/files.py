"""Opens the checker's files so that no planted file can hang it or fill its memory."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

MANIFEST_BYTES_MAX = 1 << 28
BEYOND_BYTES_MAX = 1 << 28  # bytes of a ledger beyond the pages that its header counts


def open_file(path: Path, flags: int = 0) -> FileIO:
    """A regular file, for reading. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return FileIO(fd, "rb")


def read_file(path: Path, limit: int = MANIFEST_BYTES_MAX) -> bytes:
    """The content of a regular file. Raises OSError, also if it has more than `limit` bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
        return file.read(size)  # it allocates as much as is asked for


def size_of(path: Path) -> int:
    """The size of a regular file. Raises OSError."""
    with open_file(path) as file:
        return os.fstat(file.fileno()).st_size


def refuse_what_is_no_database(path: Path) -> None:
    """Raise OSError for a FIFO, on which SQLite would block, and for a sparse file of absurd size."""
    for name in (path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
        if os.path.lexists(name):
            open_file(name).close()
    with open_file(path) as file:
        size, header = os.fstat(file.fileno()).st_size, file.read(32)
    pages = int.from_bytes(header[28:32], "big") * (int.from_bytes(header[16:18], "big") or 1)
    if size > 2 * pages + BEYOND_BYTES_MAX:
        raise OSError(errno.EFBIG, f"it has {size} bytes, and says that it has {pages}", str(path))
