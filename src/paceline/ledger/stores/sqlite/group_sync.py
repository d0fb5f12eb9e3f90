"""One sync of the write-ahead log for every process that waits for one.

A commit is written to the log without a sync and seen by everybody at once. Who needs it on the disk
comes here: the first syncs the log, with no lock that a writer needs, and notes how far it reaches; whoever
committed meanwhile and queued behind it finds its commit noted, or syncs for all who came since. The
log is one sequence, so a commit that is on the disk has everything it could see with it there.

The note lies in the writers' gate file. It is withdrawn before a sync and given again after, so one that
failed, or was killed, leaves none. The kernel tells of a failed sync only those who had the log open then
(everybody here opens it at the start) and may keep the lost pages as if they were on the disk. So whoever
opens the ledger and finds no note, or is alone (the first ever, after a reboot, over a restored copy),
writes the log's content once more, into the database, before it believes anything.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from paceline.ledger.gate import byte_range, is_locked

NOTE = struct.Struct("<qQ")  # the newest change that is known to be on the disk; the database's inode
CHECK = struct.Struct("<I")  # of the note
UNKNOWN = -1
OPEN_BYTE, SYNC_BYTE = 64, 65  # of the gate file, locked but never written


class GroupSync:
    """The locks belong to this object: one thread at a time."""

    def __init__(self, gate: Path, sync: Callable[[], None]) -> None:
        """To be followed by `enter`. Raises OSError."""
        self._sync = sync
        self._inode = 0
        self._fd = os.open(gate, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.alone = Alone(self._fd)
        try:
            # The disk is full now, with an error, or not later, when it would kill who writes the note.
            # (Where every write takes new space it still may. So would cutting the file off; a kill is safe.)
            os.posix_fallocate(self._fd, 0, mmap.PAGESIZE)
            self._map = mmap.mmap(self._fd, mmap.PAGESIZE)
        except BaseException:
            os.close(self._fd)
            raise

    def enter(self, database: Path, write_again: Callable[[int], None]) -> None:
        """Count as one who has the ledger open; `alone` is held, then the writers' gate.

        `write_again` brings the log into the database if nobody vouches for it. It is told the newest
        change that was on the disk, if a note says so.
        """
        self._inode = database.stat().st_ino
        noted = self._noted()
        if noted == UNKNOWN or self._nobody_else_is_here():
            write_again(noted)
            self._note(0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, byte_range(fcntl.F_RDLCK, OPEN_BYTE, 1))

    def wait_for(self, lsn: int, newest: Callable[[], int]) -> None:
        """Return once change `lsn` is on the disk. `newest` tells what everybody has committed so far.

        Raises OSError, and what `sync` raises.
        """
        with self.alone:
            if self._noted() < lsn:
                reaches = newest()
                self._note(UNKNOWN)
                self._sync()
                self._note(reaches)

    def close(self) -> None:
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = self.alone.fd = -1

    def _noted(self) -> int:
        """UNKNOWN if the note is withdrawn, damaged, or speaks of a database that lay here before."""
        raw = self._map[: NOTE.size + CHECK.size]
        if raw[NOTE.size :] != _check(raw[: NOTE.size]):
            return UNKNOWN
        lsn, inode = NOTE.unpack_from(raw)
        return int(lsn) if inode == self._inode else UNKNOWN

    def _note(self, lsn: int) -> None:
        raw = NOTE.pack(lsn, self._inode)
        self._map[: NOTE.size + CHECK.size] = raw + _check(raw)

    def _nobody_else_is_here(self) -> bool:
        return not is_locked(self._fd, byte_range(fcntl.F_WRLCK, OPEN_BYTE, 1))


class Alone:
    """Nobody syncs, and nobody opens the ledger, meanwhile. Never to be asked for with the gate held."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> None:
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLKW, SYNC_LOCK)

    def __exit__(self, *_: object) -> None:
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, SYNC_FREE)


SYNC_LOCK, SYNC_FREE = byte_range(fcntl.F_WRLCK, SYNC_BYTE, 1), byte_range(fcntl.F_UNLCK, SYNC_BYTE, 1)


def _check(note: bytes) -> bytes:
    return CHECK.pack(zlib.crc32(note))
