"""Whose a feature folder is: this user's or a stranger's, which run's, and whether a process uses it.

Shared memory is a place where every user may write, under any name. A folder is ours if it is a real
folder of this user that no other user can write to; what lies in it is believed then. `owner.json` names
the run, so that the folder of a run that is gone can be told from that of a run that only sleeps; each
process that uses the folder holds a lock on that file. No torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from paceline.errors import StoreError
from paceline.regular_files import open_regular

OWNER_FILE = "owner.json"
IDENTITY = "identity"
SLOT_NAME = re.compile(r"slot-\d{8,}")
HALF_MADE = re.compile(rf"({IDENTITY}|{OWNER_FILE}|slot-\d{{8,}})\.new")
OWNER_BYTES_MAX = 1 << 16
OTHERS_MAY_WRITE = 0o022


@dataclass(frozen=True)
class Owner:
    """The run that a folder serves, and the run's directory when it was signed."""

    run: str
    directory: Path


def is_strangers(folder: Path) -> bool:
    """Whether something lies there that this user did not make: it is never used, nor looked into."""
    try:
        facts = folder.lstat()
    except FileNotFoundError:
        return False
    return not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid()


def make_private(folder: Path) -> None:
    """The folder is there, and this user's alone. Raises OSError, or StoreError if it is a stranger's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_strangers(folder)
    folder.chmod(0o700)


def is_private(folder: Path) -> bool:
    """False if there is nothing. Raises StoreError if others made it or may write to it."""
    _refuse_strangers(folder)
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return False
    if mode & OTHERS_MAY_WRITE:
        raise StoreError(
            f"Other users may write to {folder} (mode {stat.S_IMODE(mode):o}).",
            why="They could change the features that are trained.",
            next="start the producer, which makes it private, or remove it.",
        )
    return True


def _refuse_strangers(folder: Path) -> None:
    if is_strangers(folder):
        raise StoreError(
            f"{folder} is a link, no directory, or not owned by user {os.geteuid()}.",
            why="Whoever owns it could change the features that are trained.",
            next="choose another run.name or features.directory, or remove it.",
        )


def sign(folder: Path, owner: Owner) -> None:
    """Say in the folder which run it serves; make it if it is not there. Raises StoreError."""
    try:
        make_private(folder)
        if owner_of(folder) != owner:
            aside = folder / f"{OWNER_FILE}.new"
            aside.unlink(missing_ok=True)
            content = {"run": owner.run, "directory": str(owner.directory)}
            with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(content, file)
            aside.rename(folder / OWNER_FILE)
    except OSError as error:
        raise StoreError(
            f"The feature folder {folder} cannot be made ({error}).",
            why="The features have no place to lie.",
            next="check features.directory, and whether there is room (`df -h`), and run the command again.",
        ) from error


def owner_of(folder: Path) -> Owner | None:
    """What `sign` wrote; None if it did not, or cannot be read."""
    try:
        with open_regular(folder / OWNER_FILE, os.O_NOFOLLOW) as file:
            content = json.loads(file.read(OWNER_BYTES_MAX))
        return Owner(str(content["run"]), Path(content["directory"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


class FolderLock:
    """Held until `close`, the end of the object, or that of the process."""

    def __init__(self, folder: Path, how: int) -> None:
        """Raises OSError if the folder is not signed, or BlockingIOError."""
        self._fd = -1
        with open_regular(folder / OWNER_FILE, os.O_NOFOLLOW) as file:
            fcntl.flock(file, how)
            self._fd = os.dup(file.fileno())  # the lock is that of the open file, which both share

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def hold(folder: Path) -> FolderLock | None:
    """The folder counts as used while the lock is held. None if it was never signed."""
    try:
        return FolderLock(folder, fcntl.LOCK_SH)
    except OSError:
        return None


def take(folder: Path) -> FolderLock | None:
    """The folder alone; None if a process uses it, or if it was never signed."""
    try:
        return FolderLock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None


def remove(folder: Path) -> None:
    """Unlink every file of the store, and the folder. Safe when it is already gone, or half gone."""
    if not is_private(folder):
        return
    with suppress(FileNotFoundError):
        names = [path.name for path in folder.iterdir()]
        slots = [name for name in names if SLOT_NAME.fullmatch(name) or HALF_MADE.fullmatch(name)]
        for name in (*slots, IDENTITY, OWNER_FILE):  # each tells of what is removed before it
            (folder / name).unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # what others put there stays
            raise


def bytes_of(folder: Path) -> int:
    """What it occupies."""
    try:
        return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(folder))
    except OSError:
        return 0
