"""One sync of the write-ahead log for every process that waits for one.

A commit is written to the log without a sync and seen by everybody at once. Who needs it on the disk
comes here: the first syncs the log, with no lock that a writer needs, and notes how far it reaches; whoever
committed meanwhile and queued behind it finds its commit noted, or syncs for all who came since. The
log is one sequence, so a commit that is on the disk has everything it could see with it there.

The note lies in the writers' gate file. It speaks of the log as the living processes know it, so whoever
opens the ledger alone (the first ever, after a reboot, over a restored copy) clears it.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paceline.ledger.gate import FLOCK

NOTE = struct.Struct("<q")  # the newest change that is known to be on the disk
OPEN_BYTE, SYNC_BYTE = 64, 65  # of the gate file, locked but never written


class GroupSync:
    """Open it with the writers' gate held. The locks belong to this object: one thread at a time."""

    def __init__(self, gate: Path, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._fd = os.open(gate, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._nobody_else_is_here():
            os.pwrite(self._fd, NOTE.pack(0), 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _byte(fcntl.F_RDLCK, OPEN_BYTE))

    def wait_for(self, lsn: int, newest: Callable[[], int]) -> None:
        """Return once change `lsn` is on the disk. `newest` tells what everybody has committed so far."""
        with self._alone():
            if self._noted() < lsn:
                reaches = newest()
                self._sync()
                os.pwrite(self._fd, NOTE.pack(reaches), 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _noted(self) -> int:
        return int(NOTE.unpack(os.pread(self._fd, NOTE.size, 0))[0])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _byte(fcntl.F_WRLCK, SYNC_BYTE))
        try:
            yield
        finally:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _byte(fcntl.F_UNLCK, SYNC_BYTE))

    def _nobody_else_is_here(self) -> bool:
        found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _byte(fcntl.F_WRLCK, OPEN_BYTE))
        return bool(struct.unpack(FLOCK, found)[0] == fcntl.F_UNLCK)


def _byte(kind: int, at: int) -> bytes:
    return struct.pack(FLOCK, kind, os.SEEK_SET, at, 1, 0)
