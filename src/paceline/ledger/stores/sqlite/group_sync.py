"""One sync of the write-ahead log for every process that waits for one.

A commit is written to the log without a sync and seen by everybody at once. Who needs it on the disk
announces it and comes here: the first syncs the log, with no lock that a writer needs, and notes how far it
reaches; whoever committed meanwhile queues behind it, and the next one of them syncs for all that had been
announced by then. The log is one sequence, so a commit that is on the disk has everything it could see with
it there.

Note and announcement lie in the writers' gate file. The note is withdrawn before a sync and given again
after, so one that failed, or was killed, leaves none. The kernel tells of a failed sync only those who had
the log open then (everybody here opens it at the start) and may keep the lost pages as if they were on the
disk. So whoever opens the ledger and finds no note, or is alone (the first ever, after a reboot, over a
restored copy), writes the log's content once more, into the database, before it believes anything.
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

CHANGE = struct.Struct("<qQ")  # its number; the database's inode
CHECK = struct.Struct("<I")  # of the two
NOTE = slice(0, CHANGE.size + CHECK.size)  # the newest change that is known to be on the disk
ANNOUNCED = slice(NOTE.stop, 2 * NOTE.stop)  # the newest that somebody waits for
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
            self._say(ANNOUNCED, 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, byte_range(fcntl.F_RDLCK, OPEN_BYTE, 1))

    def announce(self, lsn: int) -> None:
        """Change `lsn` is in the log, and its caller will wait for it; the writers' gate is held."""
        self._say(ANNOUNCED, lsn)

    def wait_for(self, lsn: int) -> None:
        """Return once change `lsn`, which is in the log, is on the disk.

        Raises OSError, and what `sync` raises.
        """
        with self.alone:
            if self._noted() < lsn:
                reaches = max(lsn, self._said(ANNOUNCED))
                self._note(UNKNOWN)
                self._sync()
                self._note(reaches)

    def close(self) -> None:
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = self.alone.fd = -1

    def _noted(self) -> int:
        return self._said(NOTE)

    def _note(self, lsn: int) -> None:
        self._say(NOTE, lsn)

    def _said(self, place: slice) -> int:
        """UNKNOWN if it is withdrawn, damaged, or speaks of a database that lay here before."""
        raw = self._map[place]
        if raw[CHANGE.size :] != _check(raw[: CHANGE.size]):
            return UNKNOWN
        lsn, inode = CHANGE.unpack_from(raw)
        return int(lsn) if inode == self._inode else UNKNOWN

    def _say(self, place: slice, lsn: int) -> None:
        raw = CHANGE.pack(lsn, self._inode)
        self._map[place] = raw + _check(raw)

    def _nobody_else_is_here(self) -> bool:
        return not is_locked(self._fd, byte_range(fcntl.F_WRLCK, OPEN_BYTE, 1))


class Alone:
    """Nobody syncs, and nobody opens the ledger, meanwhile. Never to be asked for with the gate held."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> None:
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLKW, SYNC_LOCK)
        except BaseException:  # of a signal's handler, just after
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, SYNC_FREE)


SYNC_LOCK, SYNC_FREE = byte_range(fcntl.F_WRLCK, SYNC_BYTE, 1), byte_range(fcntl.F_UNLCK, SYNC_BYTE, 1)


def _check(note: bytes) -> bytes:
    return CHECK.pack(zlib.crc32(note))
