"""Records what a program does to its files, and makes file calls fail.

While `RecordedFiles.watching()` lasts, the calls of `os` that change files under one folder are recorded, in
order, as changes of inodes; file_images.py derives from them what a power failure may leave. No fsync is
really made, so histories are fast.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from paceline.testing.file_images import NAMING, ROOT, Operation, Tree, replay, tree_of

CODES = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT, "EMFILE": errno.EMFILE}


class Killed(BaseException):
    """The process dies here. Not an Exception: nothing that handles errors may outlive it."""


@dataclass(frozen=True)
class Strike:
    """The `turn`-th call (from 1) of these kinds fails, and with `lasting` all later ones; see `errors`."""

    error: Callable[[], BaseException] | None  # None: a short write
    turn: int
    kinds: tuple[str, ...] = ("open", "write", "sync", *NAMING)
    lasting: bool = False


def failing(code: int) -> Callable[[], OSError]:
    return lambda: OSError(code, os.strerror(code))


class RecordedFiles:
    """Everything under `root`, an empty folder."""

    def __init__(self, root: Path) -> None:
        assert not list(root.iterdir()), f"{root} is not empty"
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 (no links resolved, as in `_place`)
        self.operations: list[Operation] = []
        self.struck = False
        self._strike: Strike | None = None
        self._met = 0
        self._paused = False
        self._folders: dict[int, dict[str, int]] = {ROOT: {}}
        self._fds: dict[int, int] = {}
        self._next_inode = ROOT + 1
        self._real = {name: getattr(os, name) for name in ("open", "write", "mkdir", "rename", "close")}
        self._real |= {name: getattr(os, name) for name in ("unlink", "rmdir")}

    @contextmanager
    def watching(self) -> Iterator[RecordedFiles]:
        """Ends with a look at the real folder: nothing may have changed it unseen."""
        stand_ins = {
            "open": self._open,
            "write": self._write,
            "fsync": self._fsync,
            "fdatasync": self._fsync,
            "close": self._close,
            "mkdir": self._mkdir,
            "rename": self._rename,
            "replace": self._rename,
            "unlink": self._unlink,
            "remove": self._unlink,
            "rmdir": self._rmdir,
        }
        with ExitStack() as stack:
            for name, stand_in in stand_ins.items():
                stack.enter_context(patch.object(os, name, stand_in))
            yield self
        assert self.tree() == tree_of(self.root), "the folder was changed past the recording"

    def mark(self, note: Any) -> None:
        """The program has come to a point, e.g. a call returned."""
        self.operations.append(Operation("mark", note=note))

    def arm(self, strike: Strike | None) -> None:
        self._strike, self._met, self.struck = strike, 0, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A look from outside: nothing fails, and an fsync that belongs to looking makes nothing durable."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def tree(self) -> Tree:
        """What a reader sees now."""
        return replay(self.operations, self.operations)

    # -- the stand-ins -----------------------------------------------------------------------

    def _meet(self, kind: str) -> bool:
        """Raise if the strike says so; True if a write must be short."""
        strike = self._strike
        if strike is None or self._paused or kind not in strike.kinds:
            return False
        self._met += 1
        if self._met != strike.turn and not (strike.lasting and self._met > strike.turn):
            return False
        self.struck = True
        if strike.error is not None:
            raise strike.error()
        return True

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[int, str] | None:
        """(inode of the folder, name); None if it is none of ours."""
        if dir_fd is not None:
            return (self._fds[dir_fd], os.fspath(path)) if dir_fd in self._fds else None
        absolute = Path(os.path.abspath(path))  # noqa: PTH100
        if not absolute.is_relative_to(self.root):
            return None
        inode, parts = ROOT, absolute.relative_to(self.root).parts
        for part in parts[:-1]:
            if part not in self._folders.get(inode, {}):
                return None  # the real call says why
            inode = self._folders[inode][part]
        return inode, parts[-1] if parts else ""

    def _inode(self, place: tuple[int, str]) -> int | None:
        folder, name = place
        return self._folders.get(folder, {}).get(name) if name else folder

    def _give(self, kind: str, place: tuple[int, str]) -> int:
        inode, self._next_inode = self._next_inode, self._next_inode + 1
        self._folders[place[0]][place[1]] = inode
        self.operations.append(Operation(kind, place[0], place[1], target=inode))
        return inode

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)
        if place is None:
            fd: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
            self._fds.pop(fd, None)
            return fd
        known = self._inode(place)
        creates = known is None and bool(flags & os.O_CREAT)
        self._meet("create" if creates else "open")
        fd = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        inode = self._give("create", place) if creates else known
        assert inode is not None
        if flags & os.O_TRUNC and not creates:
            self.operations.append(Operation("cut", inode))
        self._fds[fd] = inode
        return fd

    def _close(self, fd: int) -> None:
        self._fds.pop(fd, None)
        self._real["close"](fd)

    def _write(self, fd: int, data: Any) -> int:
        if fd not in self._fds:
            written: int = self._real["write"](fd, data)
            return written
        given = bytes(data)
        if self._meet("write"):
            given = given[: max(1, len(given) // 2)]
        written = self._real["write"](fd, given)
        offset = os.lseek(fd, 0, os.SEEK_CUR) - written  # O_APPEND moves it to the end first
        self.operations.append(Operation("write", self._fds[fd], offset=offset, data=given[:written]))
        return written

    def _fsync(self, fd: int) -> None:
        if fd not in self._fds or self._paused:
            return
        try:
            self._meet("sync")
        except OSError:
            self.operations.append(Operation("failed_sync", self._fds[fd]))
            raise
        self.operations.append(Operation("sync", self._fds[fd]))

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        if place is not None and place[1] and self._inode(place) is None:
            self._meet("mkdir")
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        if place is not None:
            self._folders[self._give("mkdir", place)] = {}

    def _rename(self, source: Any, to: Any, **dir_fds: Any) -> None:
        before, after = self._place(source), self._place(to)
        if before is None or after is None or dir_fds:
            assert before is after, "a rename into the recorded folder, or out of it"
            self._real["rename"](source, to, **dir_fds)
            return
        self._meet("rename")
        self._real["rename"](source, to)
        (folder, name), (other, new_name) = before, after
        assert folder == other, "a rename from folder to folder needs two fsyncs; nothing does that"
        target = self._folders[folder].pop(name)
        self._folders[folder][new_name] = target
        self.operations.append(Operation("rename", folder, name, new_name, target))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._take("unlink", path, dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._take("rmdir", path, dir_fd)

    def _take(self, call: str, path: Any, dir_fd: int | None) -> None:
        place = self._place(path, dir_fd)
        if place is not None and self._inode(place) is not None:
            self._meet("remove")
        self._real[call](path, dir_fd=dir_fd)
        if place is not None:
            target = self._folders[place[0]].pop(place[1])
            self.operations.append(Operation("remove", place[0], place[1], target=target))
