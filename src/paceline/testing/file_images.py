"""The images of files that a power failure may leave, given the operations of a program.

After Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014: what an fsync covered survives;
of the rest any part may. Bytes may be missing, torn at sectors, or garbage; created, renamed or removed
names may be as before, in any combination. A file's fsync does not cover its name, a folder's fsync
covers no bytes. After a *failed* fsync the file's bytes stay in doubt for ever (fsyncgate).
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = 1
TEARS = (512, 4096)
NEVER = 1 << 60
NAMING = ("create", "mkdir", "rename", "remove")
Tree = dict[str, bytes | None]  # content by path; None: a folder


@dataclass(frozen=True)
class Operation:
    """`inode` is what is written, cut or synced; for names (NAMING) it is the folder that holds them."""

    kind: str  # create | mkdir | rename | remove | write | cut | sync | failed_sync | mark
    inode: int = 0
    name: str = ""
    new_name: str = ""
    target: int = 0  # the inode that the name is, or was
    offset: int = 0
    data: bytes = b""
    note: Any = None


def replay(operations: list[Operation], done: list[Operation | None] | list[Operation]) -> Tree:
    """The tree if of `operations` those in `done` (at the same place; None: not) reached the disk."""
    folders: dict[int, dict[str, int]] = {ROOT: {}}
    folders |= {op.target: {} for op in operations if op.kind == "mkdir"}
    contents: dict[int, bytearray] = {op.target: bytearray() for op in operations if op.kind == "create"}
    for op in done:
        if op is None or op.kind not in (*NAMING, "write", "cut"):
            continue
        if op.kind == "write":
            held = contents[op.inode]
            held.extend(bytes(max(0, op.offset - len(held))))
            held[op.offset : op.offset + len(op.data)] = op.data
        elif op.kind == "cut":
            del contents[op.inode][op.offset :]
        else:
            names = folders[op.inode]
            if op.kind in ("rename", "remove") and names.get(op.name) == op.target:
                del names[op.name]
            if op.kind != "remove":
                names[op.new_name or op.name] = op.target
    tree: Tree = {}
    _list(folders, contents, ROOT, "", tree)
    return tree


def _list(
    folders: Mapping[int, Mapping[str, int]],
    contents: Mapping[int, bytearray],
    inode: int,
    prefix: str,
    tree: Tree,
) -> None:
    for name, target in folders[inode].items():
        tree[prefix + name] = None if target in folders else bytes(contents[target])
        if target in folders:
            _list(folders, contents, target, f"{prefix}{name}/", tree)


def tree_of(root: Path) -> Tree:
    paths = [path for path in root.rglob("*") if path.is_dir() or path.is_file()]
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in paths}


def lay_out(tree: Tree, folder: Path) -> None:
    """Make the tree in `folder`, which does not exist yet."""
    folder.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


@dataclass(frozen=True)
class Image:
    """What is found after the power failed when `happened` operations had been made; `way`: what was lost."""

    happened: int
    way: str
    tree: Tree
    note: Any  # of the last mark

    @contextmanager
    def laid_out(self, folder: Path, where: str) -> Iterator[Path]:
        """The image in `folder` for the block. No fsync reaches the disk: none of thousands must last."""
        lay_out(self.tree, folder)
        try:
            with patch.object(os, "fsync", lambda _: None):
                yield folder
        except Exception as error:
            error.add_note(f"{where}, power lost after operation {self.happened}: {self.way}")
            raise
        shutil.rmtree(folder)


def covered_from(operations: list[Operation]) -> list[int]:
    """For each operation the number of operations after which it is certainly on the disk."""
    covered = [NEVER] * len(operations)
    waiting: dict[int, list[int]] = {}
    for i, op in enumerate(operations):
        if op.kind in (*NAMING, "write", "cut"):
            waiting.setdefault(op.inode, []).append(i)
        elif op.kind == "sync":
            for j in waiting.pop(op.inode, []):
                covered[j] = i + 1
        elif op.kind == "failed_sync":
            # Names are metadata: a later fsync covers them or the file system has stopped altogether.
            named = [j for j in waiting.pop(op.inode, []) if operations[j].kind in NAMING]
            waiting[op.inode] = named
    return covered


def images(
    operations: list[Operation], rng: random.Random, *, per_point: int, since: int = 0
) -> Iterator[Image]:
    """Different trees for power failures after every number of operations from `since` on.

    At each: everything made, nothing unsynced, all names and no bytes, all bytes and no names, and
    `per_point` random ones. No tree comes twice under the same mark.
    """
    covered = covered_from(operations)
    note: Any = None
    seen: set[Any] = set()
    for happened in range(len(operations) + 1):
        if happened and operations[happened - 1].kind == "mark":
            note = operations[happened - 1].note
            seen.clear()
        if happened < since:
            continue
        pending = [
            i
            for i in range(happened)
            if covered[i] > happened and operations[i].kind in (*NAMING, "write", "cut")
        ]
        ways = ["all", "none", "names", "bytes", *rng.choices(("some", "torn", "garbage"), k=per_point)]
        for way in ways[: None if pending else 1]:
            done: list[Operation | None] = list(operations[:happened])
            for i in pending:
                done[i] = _reached(operations[i], way, rng)
            tree = replay(operations, done)
            key = frozenset(tree.items())
            if key not in seen:
                seen.add(key)
                yield Image(happened, way, tree, note)


def _reached(op: Operation, way: str, rng: random.Random) -> Operation | None:
    """What of an operation that no fsync covered is on the disk."""
    if way in ("all", "none"):
        return op if way == "all" else None
    if way in ("names", "bytes"):
        return op if (op.kind in NAMING) == (way == "names") else None
    if op.kind != "write" or way == "some":
        return op if rng.random() < 0.5 else None
    sector = rng.choice(TEARS)
    at = rng.randint(0, -(-len(op.data) // sector)) * sector
    if way == "torn":
        if rng.random() < 0.5:
            return replace(op, data=op.data[:at])
        lost = bytes(len(op.data[at : at + sector]))  # one sector in the middle was not written
        return replace(op, data=op.data[:at] + lost + op.data[at + sector :])
    return replace(op, data=op.data[:at] + rng.randbytes(len(op.data[at:])))
