"""A doorbell between processes of one host: wake-ups without polling.

Every waiter hangs a FIFO into a shared folder; who changed something writes one byte into each.
A byte carries no data, so a lost or surplus one can never be wrong: a waiter hangs its FIFO up
first, then looks at the store, then sleeps. A FIFO nobody reads (its waiter was killed) answers
ENXIO and is taken down by the next ring that anybody hears. Every waiter holds a shared lock meanwhile:
looking for it costs a ringer a tenth of what looking through the folder does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

from paceline.errors import LedgerError
from paceline.ledger.gate import byte_range, is_locked


class Bell:
    def __init__(self, folder: Path) -> None:
        """Raises LedgerError."""
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._waiters = self._open_lock()
        except OSError as error:
            raise _cannot_be_made(folder, error) from error
        self.close = weakref.finalize(self, os.close, self._waiters)

    def _open_lock(self) -> int:
        return os.open(self._folder / "waiters.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def ring(self) -> None:
        """Wake every waiter. Never blocks: a full FIFO belongs to a waiter that is already awake.

        Never fails either: what is told has happened, and whoever cannot be woken (no file descriptor is
        left) looks again at the end of his wait.
        """
        with contextlib.suppress(OSError):
            if is_locked(self._waiters):
                with os.scandir(self._folder) as entries:
                    for entry in entries:
                        if entry.name.endswith(".fifo"):
                            self._ring_one(entry.path)

    def _ring_one(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:
                with contextlib.suppress(OSError):
                    os.unlink(path)  # noqa: PTH108 (a str from scandir)
            return
        try:
            with contextlib.suppress(OSError):
                os.write(fd, b"!")
        finally:
            os.close(fd)

    def wait_for_change(self, mark: Callable[[], int], seen: int, timeout_s: float) -> int:
        """Block until `mark() != seen` or the timeout; the mark then."""
        deadline = monotonic() + timeout_s
        with self.listen() as listener:
            while (now := mark()) == seen and (left := deadline - monotonic()) > 0:
                listener.wait(left)
        return now

    @contextlib.contextmanager
    def listen(self) -> Iterator[Listener]:
        """Hang up a FIFO for the length of the block. Raises LedgerError."""
        name = f"{os.getpid()}-{uuid.uuid4().hex}"
        aside, path = self._folder / f"{name}.new", self._folder / f"{name}.fifo"
        opened = contextlib.ExitStack()
        try:
            lock = self._open_lock()
            opened.callback(os.close, lock)
            fcntl.fcntl(lock, fcntl.F_OFD_SETLKW, byte_range(fcntl.F_RDLCK))
            os.mkfifo(aside, 0o600)
            # Opened for both directions, so that it never reads end-of-file; renamed into sight only
            # when it is open, so that a ringer never takes it for a dead waiter's.
            fd = os.open(aside, os.O_RDWR | os.O_NONBLOCK)
            opened.callback(os.close, fd)
            aside.rename(path)
        except OSError as error:
            opened.close()
            with contextlib.suppress(OSError):
                aside.unlink()
            raise _cannot_be_made(path, error) from error
        try:
            yield Listener(fd)
        finally:
            opened.close()
            path.unlink(missing_ok=True)


def _cannot_be_made(path: Path, error: OSError) -> LedgerError:
    return LedgerError(
        f"{path} cannot be made ({error}).",
        why="Without it this process would not hear of changes. Nothing was changed.",
        next="check that disk and the limit of open files (`ulimit -n`), then run it again.",
    )


class Listener:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def wait(self, timeout_s: float) -> bool:
        """True if the bell rang since the last call, or rings within the timeout."""
        if not self._poll.poll(max(0.0, timeout_s) * 1000):
            return False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 4096):
                pass
        return True
