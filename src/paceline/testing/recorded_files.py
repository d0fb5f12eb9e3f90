"""A file system under observation: what a power failure may leave of the files that are made durable here.

Everything that `durable_files` and the checkpoint folder do is recorded: names made, moved and removed,
bytes written, syncs. An image follows the rules that file systems really keep: bytes are on the disk once
their file was synced, before that the file may be empty, cut, torn or hold garbage; a name is on the disk
once its folder was synced, before that each single operation on names may be there or not. A rename is
atomic.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from paceline import durable_files


@dataclass(eq=False)
class Node:
    """A file (`data`: as written; `safe`: as synced, None if never) or a folder (`names`, all and synced)."""

    is_folder: bool
    data: bytearray = field(default_factory=bytearray)
    safe: bytes | None = None


@dataclass
class Change:
    """One operation on names: `node` appears at `to` and disappears from `off`."""

    node: Node
    to: Path | None
    off: Path | None
    done_in: set[Path]  # folders that were not synced since


class RecordedFiles:
    """Watches everything below `root`, which must be empty."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.marks: list[Any] = []
        self.steps = 0
        self._names: dict[Path, Node] = {root: Node(is_folder=True)}
        self._safe: dict[Path, Node] = dict(self._names)
        self._waiting: list[Change] = []
        self._fds: dict[int, Path] = {}
        self._watchers: list[Any] = []

    @contextmanager
    def watching(self, seen: Any) -> Iterator[None]:
        """Record what happens in the block; `seen()` is called after every operation."""
        self._seen = seen
        real_mkdir, real_rename, real_rmtree = Path.mkdir, Path.rename, shutil.rmtree

        def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
            existed = path.exists()
            real_mkdir(path, *args, **kwargs)
            if not existed and self._is_mine(path):
                self._appear(path, Node(is_folder=True))

        def rename(path: Path, target: Any) -> Path:
            moved = real_rename(path, target)
            if self._is_mine(path):
                self._move(path, Path(target))
            return moved

        def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
            real_rmtree(path, *args, **kwargs)
            if self._is_mine(Path(path)):
                self._vanish(Path(path))

        with ExitStack() as stack:
            stack.enter_context(patch.object(Path, "mkdir", mkdir))
            stack.enter_context(patch.object(Path, "rename", rename))
            stack.enter_context(patch.object(shutil, "rmtree", rmtree))
            stack.enter_context(patch.object(durable_files, "os", _Os(self)))
            yield

    def _is_mine(self, path: Path) -> bool:
        return path == self.root or self.root in path.parents

    def _appear(self, path: Path, node: Node) -> None:
        self._names[path] = node
        self._waiting.append(Change(node, path, None, {path.parent}))
        self._step()

    def _move(self, path: Path, target: Path) -> None:
        for old in [p for p in self._names if p == path or path in p.parents]:
            self._names[target / old.relative_to(path)] = self._names.pop(old)
        node = self._names[target]
        self._waiting.append(Change(node, target, path, {path.parent, target.parent}))
        self._step()

    def _vanish(self, path: Path) -> None:
        for old in sorted((p for p in self._names if p == path or path in p.parents), reverse=True):
            self._waiting.append(Change(self._names.pop(old), None, old, {old.parent}))
        self._step()

    def synced(self, path: Path) -> None:
        """fsync of a file or a folder."""
        node = self._names[path]
        if not node.is_folder:
            node.safe = bytes(node.data)
        for change in list(self._waiting):
            change.done_in.discard(path)
            if not change.done_in:
                self._waiting.remove(change)
                _apply(self._safe, change)
        self._step()

    def _step(self) -> None:
        self.steps += 1
        self._seen()

    def image(self, target: Path, rng: random.Random) -> None:
        """Write into `target` what a power failure right now may leave."""
        names = dict(self._safe)
        way = rng.choice(("none", "all", "some", "shuffled"))
        waiting = [c for c in self._waiting if way == "all" or (way != "none" and rng.random() < 0.6)]
        if way == "shuffled":
            rng.shuffle(waiting)
        for change in waiting:
            _apply(names, change)
        for path, node in sorted(names.items()):
            place = target / path.relative_to(self.root)
            if place != target and not place.parent.is_dir():
                continue  # its folder is not there
            if node.is_folder:
                place.mkdir(exist_ok=True)
            else:
                place.write_bytes(_bytes_of(node, rng))


def _apply(names: dict[Path, Node], change: Change) -> None:
    if change.off is not None and change.to is not None:
        for old in [p for p in names if change.off in p.parents]:
            names[change.to / old.relative_to(change.off)] = names.pop(old)
    if change.off is not None:
        names.pop(change.off, None)
    if change.to is not None:
        names[change.to] = change.node


def _bytes_of(node: Node, rng: random.Random) -> bytes:
    if node.safe == bytes(node.data):
        return node.safe
    whole = bytes(node.data)
    cut = rng.randint(0, len(whole))
    return rng.choice(
        [
            node.safe or b"",
            whole,
            whole[:cut],
            whole[: cut // 512 * 512],
            whole[:cut] + rng.randbytes(len(whole) - cut),
            bytes(len(whole)),
        ]
    )


class _Os:
    """`os` as durable_files uses it, watched."""

    def __init__(self, files: RecordedFiles) -> None:
        self._files = files

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        new = bool(flags & os.O_CREAT) and not Path(path).exists()
        fd = os.open(path, flags, mode)
        if not self._files._is_mine(Path(path)):
            return fd
        self._files._fds[fd] = Path(path)
        if new:
            self._files._appear(Path(path), Node(is_folder=False))
        elif flags & os.O_TRUNC:
            self._files._names[Path(path)].data.clear()
            self._files._step()
        return fd

    def write(self, fd: int, data: Any) -> int:
        written = os.write(fd, data)
        if fd in self._files._fds:
            self._files._names[self._files._fds[fd]].data += bytes(data[:written])
            self._files._step()
        return written

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        if fd in self._files._fds:
            self._files.synced(self._files._fds[fd])

    def close(self, fd: int) -> None:
        os.close(fd)
        self._files._fds.pop(fd, None)
