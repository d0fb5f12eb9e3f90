"""The queue of writers of one ledger, a file lock of one host.

The kernel frees a file lock when its holder dies, `kill -9` included, so a successor goes on at
once and no timeout decides anything.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from paceline.ledger.locks import advising, cannot_use


class WriterGate:
    """SQLite's own busy handler sleeps and retries, so one writer in a tight loop starves the others;
    flock(2) queues them."""

    def __init__(self, path: Path) -> None:
        """Raises LedgerError."""
        self._what = f"the gate of writers, {path},"
        with advising(self._what):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def __enter__(self) -> None:
        """Wait for this process's turn. Raises LedgerError before anything is written."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError as error:
            raise cannot_use(self._what, error) from error
        except BaseException:  # of a signal's handler, just after
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            raise

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class NoGate:
    """Of a ledger that no other process can open."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass
