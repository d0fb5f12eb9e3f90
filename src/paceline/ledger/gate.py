"""The queue of one ledger's writers: a file lock on one host.

The kernel frees a file lock when its holder dies, even by `kill -9`, so the next writer goes on at once
and nothing depends on a timeout.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

from paceline.ledger.locks import advising, cannot_use

NOTE = struct.Struct("<QQ")  # the newest change that was synced; the inode of its database
CHECK = struct.Struct("<I")


class WriterGate:
    """flock(2) queues the writers; SQLite's busy handler sleeps and retries, so that one writer in a tight
    loop would starve the others. The gate's file notes up to which change the ledger is synced."""

    def __init__(self, path: Path) -> None:
        """Raises LedgerError."""
        self.path = path
        self._what = f"the gate of writers, {path},"
        with advising(self._what):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def __enter__(self) -> None:
        """Wait for this process's turn. Raises LedgerError before anything is written."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError as error:
            raise cannot_use(self._what, error) from error
        except BaseException:  # a signal handler raised just after the lock was taken
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            raise

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def note(self, change: int, inode: int) -> None:
        """This change is on the disk. A note that cannot be written is one check less, and no error."""
        data = NOTE.pack(change, inode)
        with suppress(OSError):
            os.pwrite(self._fd, data + CHECK.pack(zlib.crc32(data)), 0)

    def noted(self, inode: int) -> int:
        """The newest change of this database that was on the disk once; 0 if nothing is known of it."""
        data = os.pread(self._fd, NOTE.size + CHECK.size, 0)
        note, check = data[: NOTE.size], data[NOTE.size :]
        if len(data) < NOTE.size + CHECK.size or CHECK.pack(zlib.crc32(note)) != check:
            return 0
        change, of_inode = NOTE.unpack(note)
        return int(change) if of_inode == inode else 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class NoGate:
    """For a ledger that no other process can open."""

    def note(self, change: int, inode: int) -> None:
        """There is nothing to be missed later."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass
