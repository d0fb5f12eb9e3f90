"""Finds the runs below a folder, and what each of them takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from paceline.errors import ConfigError, explained
from paceline.features.ownership import bytes_of
from paceline.monitoring.schema import RunStatus
from paceline.monitoring.status import read_status
from paceline.roles.snapshot import has_ledger, making_sense

DEPTH_MAX = 4
TREE_FILES_MAX = 100_000


class FoundRun(Struct, frozen=True, kw_only=True):
    """A run that lies below a folder."""

    directory: Annotated[str, Meta(description="where it lies")]
    disk_bytes: Annotated[int, Meta(description="of the files in its directory")]
    memory_bytes: Annotated[int, Meta(description="of its features on this host")] = 0
    status: Annotated[RunStatus | None, Meta(description="null if it cannot be read")] = None
    problem: Annotated[str, Meta(description="why it cannot be read; empty if it can")] = ""


def find_runs(base: Path) -> Iterator[FoundRun]:
    """Every run in `base` and some levels below, by path. Raises ConfigError if `base` cannot be listed."""
    try:
        next(base.iterdir(), None)
    except OSError as error:
        raise ConfigError(
            f"{base} cannot be listed ({error.strerror}).",
            why="Runs are looked for in it and below.",
            next="check the path; paceline runs [DIR]",
        ) from error
    for directory in run_folders(base):
        yield _found(directory)


def run_folders(folder: Path, depth: int = DEPTH_MAX) -> Iterator[Path]:
    """What a run holds is no run, and links are not followed, so that nothing comes twice."""
    if has_ledger(folder):
        yield folder
        return
    try:
        with os.scandir(folder) as entries:
            below = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in below if depth else ():
        if not name.startswith("."):
            yield from run_folders(folder / name, depth - 1)


def _found(directory: Path) -> FoundRun:
    disk = _disk_bytes(directory)
    try:
        with making_sense(directory):
            status = read_status(directory)
    except Exception as error:  # noqa: BLE001 (it is shown)
        return FoundRun(directory=str(directory), disk_bytes=disk, problem=explained(error).what)
    folder = status.features.folder
    memory = bytes_of(Path(folder)) if folder else 0
    return FoundRun(directory=str(directory), disk_bytes=disk, memory_bytes=memory, status=status)


def _disk_bytes(directory: Path) -> int:
    total = 0
    for count, path in enumerate(directory.rglob("*")):
        if count >= TREE_FILES_MAX:
            break
        try:
            total += path.lstat().st_blocks * 512
        except OSError:
            continue
    return total
