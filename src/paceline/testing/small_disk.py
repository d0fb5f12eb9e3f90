"""A small disk of its own for one process: a tmpfs that is really full (ENOSPC), in a mount namespace."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

CLONE_NEWNS = 0x00020000
MS_PRIVATE, MS_REC = 1 << 18, 1 << 14
BLOCK = 4096
_libc = ctypes.CDLL(None, use_errno=True)


class NoDiskError(Exception):
    """This machine does not let this process mount anything; the text says what was refused."""


class SmallDisk:
    """`num_bytes` of disk at `folder`, for processes that `enter`; nobody else sees it, or what is on it."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        """Raises NoDiskError."""
        self.folder = folder
        folder.mkdir()
        said, tell = os.pipe()
        self._holder = os.fork()  # the namespace and the disk end with it
        if self._holder == 0:
            _hold(folder, num_bytes, tell)
        os.close(tell)
        with os.fdopen(said) as answer:
            if refused := answer.read():
                os.waitpid(self._holder, 0)
                raise NoDiskError(refused)
        self._namespace = os.open(f"/proc/{self._holder}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def inside(self) -> Path:
        """The disk, for this process."""
        return Path(f"/proc/{self._holder}/root{self.folder.absolute()}")

    def enter(self) -> None:
        """This process, which must have one thread, sees the disk from now on."""
        if _libc.setns(self._namespace, CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "setns(CLONE_NEWNS) is refused")

    def fill(self, room: int) -> None:
        """Leave so many bytes, about."""
        there = os.statvfs(self.inside)
        size = (there.f_bavail - room // BLOCK) * there.f_frsize
        with (self.inside / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, size)

    def empty(self) -> None:
        """There is room again."""
        (self.inside / "ballast").unlink()

    def close(self) -> None:
        os.close(self._namespace)
        os.kill(self._holder, signal.SIGKILL)
        os.waitpid(self._holder, 0)


def mount_small_disk(folder: Path, num_bytes: int) -> None:
    """In this process's own view from now on, which its children share. Raises OSError."""
    if _libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNS) is refused")
    if _libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "a private mount is refused")
    if _libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=%d" % num_bytes):
        raise OSError(ctypes.get_errno(), "mounting a tmpfs is refused")


def _hold(folder: Path, num_bytes: int, tell: int) -> None:
    """In a child: mount the disk where nobody else sees it, and stay. Never returns."""
    try:
        mount_small_disk(folder, num_bytes)
    except OSError as error:
        os.write(tell, str(error).encode())
        os._exit(1)
    os.close(tell)
    signal.pause()
    os._exit(0)
