"""At most one live process for each role of a run on this host: file locks.

The kernel frees a file lock when its holder dies, even by `kill -9`, so a successor takes over at once
and nothing depends on a timeout.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from paceline.errors import LedgerError, RunBusyError


@contextlib.contextmanager
def advising(file: str) -> Iterator[None]:
    """Turn an OSError into a LedgerError with advice."""
    try:
        yield
    except OSError as error:
        raise cannot_use(file, error) from error


def cannot_use(file: str, error: OSError) -> LedgerError:
    return LedgerError(
        f"{file} cannot be used ({error}).",
        why="Without it two processes could write at once. Nothing was changed.",
        next="check that disk and the limit of open files (`ulimit -n`), then run it again.",
    )


FLOCK = "hhlli"  # struct flock: type, whence, start, length (0: to the end), pid (0 for this kind)


def byte_range(kind: int, start: int = 0, length: int = 0) -> bytes:
    """`kind` as in fcntl(2); length 0: to the end of the file."""
    return struct.pack(FLOCK, kind, os.SEEK_SET, start, length, 0)


ALL_FOR_WRITING = byte_range(fcntl.F_WRLCK)


def is_locked(fd: int, range_: bytes = ALL_FOR_WRITING) -> bool:
    """Whether another process holds a lock that conflicts with this one. Raises OSError."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, range_)
    return bool(struct.unpack(FLOCK, found)[0] != fcntl.F_UNLCK)


class RoleLock:
    """At most one live process per role of a run. Held until `release` or death.

    An open-file-description lock rather than flock(2): it can be tested without being taken, so that
    asking which process holds a role never blocks a process that starts.
    """

    def __init__(self, folder: Path, role: str) -> None:
        """Raises RunBusyError, naming the holder, if another live process has it; LedgerError."""
        self.role = role
        path = folder / f"{role}.lock"
        with advising(f"the lock {path}"):
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with advising(f"the lock {path}"):
                self._take(folder, role)
        except BaseException:
            self.release()
            raise

    def _take(self, folder: Path, role: str) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, ALL_FOR_WRITING)
        except (BlockingIOError, PermissionError) as error:  # both mean that it is held
            holder = _named_holder(self._fd)
            it = f"process {holder}" if holder else "its process"
            raise RunBusyError(
                f"The {role} of the run in {folder} is already running (process {holder or 'unknown'}).",
                why=f"Two {role}s would do the same work twice; the running one is not disturbed.",
                next=f"watch it: `paceline status {folder}`; or stop {it} and run this again.",
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, _naming(os.getpid()), 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


UNKNOWN = 0  # no process has this id


def live_holder(folder: Path, role: str) -> int | None:
    """The id of the process that holds the role now, UNKNOWN if the file does not say; None if it is free.

    The lock decides whether the role is held; the file's content only names the holder.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW  # a FIFO must not block
    try:
        fd = os.open(folder / f"{role}.lock", flags)
    except OSError:  # absent, or not readable by this user
        return None
    try:
        return _named_holder(fd) if is_locked(fd) else None
    finally:
        os.close(fd)


def _naming(pid: int) -> bytes:
    """With a checksum, since a user who reads a wrong number may stop the wrong process."""
    name = str(pid).encode()
    return name + b" %08x" % zlib.crc32(name)


def _named_holder(fd: int) -> int:
    content = os.pread(fd, 64, 0)
    name = content.partition(b" ")[0]
    return int(name) if name.isdigit() and content == _naming(int(name)) else UNKNOWN
