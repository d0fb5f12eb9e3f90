"""Ownership of a feature folder: which user's it is, which run's, and whether a process uses it.

Every user may create any name in shared memory. So a folder is trusted only if it is a real folder of this
user that no other user can write to. `owner.json` names the run, which tells the folder of a deleted run from
that of a paused one; each process that uses the folder holds a lock on that file. No torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.durable_files import sync_folder, write_file
from paceline.errors import StoreError
from paceline.mounts import LOOK, look_anew
from paceline.regular_files import open_regular

OWNER_FILE = "owner.json"
IDENTITY = "identity"
WRITER_LOCK = "writer.lock"
SLOT_NAME = re.compile(r"slot-(\d+-)?\d{8,}")
SEALED, ASIDE = ".safetensors", ".part"  # endings of a sample's file, whole and half-written
SAMPLE_FILE = re.compile(r"\d+-[0-9a-f]{24}\.(safetensors|part)")
BLOCK = re.compile(r"\d{8,}")  # a folder of such files
STORE_ID = "store-id"
ENGINES_FILE = re.compile(r"[\w.-]+\.safetensors(\.lock)?")  # what an engine's server leaves
HALF_MADE = re.compile(
    rf"({IDENTITY}|{STORE_ID}(\.[0-9a-f]+)?|{OWNER_FILE}(\.[0-9a-f]+)?|{SLOT_NAME.pattern})\.new"
)
LEFT_BY_A_LOOK = re.compile(rf"{re.escape(LOOK)}[0-9a-f]+")
OWNER_BYTES_MAX = 1 << 16
STORE_ID_BYTES = 32
OTHERS_MAY_WRITE = 0o022


@dataclass(frozen=True)
class Owner:
    """The run that a folder serves, and the run's directory at the time of `sign`.

    Of a folder that hosts share also `host`, on which that directory lies, and `ledger`, where the run's
    ledger is if other hosts reach it; else "" and None.
    """

    run: str
    directory: Path
    host: str = ""
    ledger: Mapping[str, Any] | None = None


def is_strangers(folder: Path) -> bool:
    """Whether another user created what lies there: it is never used or read."""
    try:
        facts = folder.lstat()
    except FileNotFoundError:
        return False
    return not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid()


def make_private(folder: Path) -> None:
    """Create the folder, or make it private to this user. Raises OSError, or StoreError if it is another
    user's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_strangers(folder)
    folder.chmod(0o700)


def is_private(folder: Path) -> bool:
    """False if there is no folder. Raises StoreError if other users own it or may write to it."""
    _refuse_strangers(folder)
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return False
    if mode & OTHERS_MAY_WRITE:
        raise StoreError(
            f"Other users may write to {folder} (mode {stat.S_IMODE(mode):o}).",
            why="They could change the features that the draft is trained on.",
            next="start the producer, which makes it private, or remove it.",
        )
    return True


def _refuse_strangers(folder: Path) -> None:
    if is_strangers(folder):
        raise StoreError(
            f"{folder} is a link, not a directory, or not owned by user {os.geteuid()}.",
            why="Its owner could change the features that the draft is trained on.",
            next="choose another run.name or features.directory, or remove it.",
        )


def sign(folder: Path, owner: Owner) -> None:
    """Record in the folder which run it serves; create it if it is missing. Raises StoreError."""
    try:
        make_private(folder)
        if owner_of(folder) != owner:
            aside = folder / f"{OWNER_FILE}.{secrets.token_hex(8)}.new"  # several roles may do it at a time
            content = {**asdict(owner), "directory": str(owner.directory)}
            with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(content, file)
            aside.rename(folder / OWNER_FILE)
    except OSError as error:
        raise StoreError(
            f"The feature folder {folder} cannot be created ({error}).",
            why="Without it features cannot be stored.",
            next="check features.directory, and whether there is room (`df -h`), and run the command again.",
        ) from error


def owner_of(folder: Path) -> Owner | None:
    """What `sign` wrote; None if the folder is unsigned or cannot be read."""
    try:
        with open_regular(folder / OWNER_FILE, os.O_NOFOLLOW) as file:
            content = json.loads(file.read(OWNER_BYTES_MAX))
        host, ledger = str(content.get("host", "")), content.get("ledger")
        known = ledger if isinstance(ledger, dict) else None
        return Owner(str(content["run"]), Path(content["directory"]), host, known)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


class FolderLock:
    """A lock that is held until `close`, or until the object or the process ends."""

    def __init__(self, fd: int) -> None:
        """`fd`: of the locked file; it is closed with the lock."""
        self._fd = fd

    def is_of(self, folder: Path) -> bool:
        """Whether the locked file is still the folder's: another process may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._fd), (folder / OWNER_FILE).lstat())
        except OSError:
            return False

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
    """A shared lock: the folder counts as used while it is held. None if it was never signed."""
    return _locked(folder, fcntl.LOCK_SH)


def take(folder: Path) -> FolderLock | None:
    """An exclusive lock; None if a process uses the folder, or if it was never signed."""
    return _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked(folder: Path, how: int) -> FolderLock | None:
    flags = os.O_NOFOLLOW | (os.O_RDWR if how & fcntl.LOCK_EX else 0)  # as network filesystems want it
    with suppress(OSError), open_regular(folder / OWNER_FILE, flags) as file:
        fcntl.flock(file, how)
        return FolderLock(os.dup(file.fileno()))  # both descriptors share the open file, and so its lock
    return None


class WriterLock(FolderLock):
    """The right of a process to write to the store as one of its writers."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One writer of the store at a time: slots are taken, made, removed, or freed for a neighbour."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


def write_as(folder: Path, writer: int) -> WriterLock:
    """Keep other processes from being this writer of the store while the lock is held.

    A record lock of the whole process, so that a process may open its own store anew. Raises StoreError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(folder / WRITER_LOCK, flags, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, writer)
    except (BlockingIOError, PermissionError) as error:
        os.close(fd)
        raise StoreError(
            f"Another process is writer {writer} of the feature store in {folder}.",
            why="A second one would free what the first has half-written. Nothing was changed.",
            next="end the other producer of this name, or give this one another features.directory.",
        ) from error
    return WriterLock(fd)


def remove(folder: Path) -> None:
    """Unlink every file of the store, and the folder. Safe if some or all of it is already gone."""
    if not is_private(folder):
        return
    with suppress(FileNotFoundError):
        names = [path.name for path in folder.iterdir()]
        for block in filter(BLOCK.fullmatch, names):
            _remove_files(folder / block, SAMPLE_FILE, LEFT_BY_A_LOOK)
            _remove_if_empty(folder / block)
        _remove_files(folder, SLOT_NAME, HALF_MADE, ENGINES_FILE, LEFT_BY_A_LOOK)
        for name in (WRITER_LOCK, IDENTITY, STORE_ID, OWNER_FILE):  # last those that identify the rest
            (folder / name).unlink(missing_ok=True)
    _remove_if_empty(folder)


def _remove_files(folder: Path, *kinds: re.Pattern[str]) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            if any(kind.fullmatch(path.name) for kind in kinds):
                path.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    """Files of other programs stay, and those that a network filesystem keeps because they are open."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise


def bytes_of(folder: Path) -> int:
    """Bytes that the folder occupies, with the folders in it."""
    try:
        entries = list(os.scandir(folder))
        return sum(
            bytes_of(Path(entry.path))
            if entry.is_dir(follow_symlinks=False)
            else entry.stat(follow_symlinks=False).st_blocks * 512
            for entry in entries
        )
    except OSError:
        return 0


def store_id(folder: Path) -> str:
    """What identifies the store in a folder that hosts share; "" if there is none. Raises StoreError."""
    if not is_private(folder):
        return ""
    try:
        with open_regular(folder / STORE_ID, os.O_NOFOLLOW) as file:
            found = file.read(STORE_ID_BYTES + 1).decode(errors="replace")
    except OSError:
        return ""
    return found if len(found) == STORE_ID_BYTES else ""


def make_store_id(folder: Path) -> str:
    """That of a new store, unless there is one: of starts at one moment, all get the same. Raises OSError,
    StoreError."""
    make_private(folder)
    look_anew(folder)
    if not store_id(folder):
        aside = folder / f"{STORE_ID}.{secrets.token_hex(8)}.new"
        write_file(aside, secrets.token_hex(STORE_ID_BYTES // 2).encode())
        try:
            (folder / STORE_ID).hardlink_to(aside)  # never over one that a ledger has recorded
        except OSError:  # another start was faster, or this filesystem knows no links
            aside.unlink() if store_id(folder) else aside.rename(folder / STORE_ID)
        else:
            aside.unlink()
        sync_folder(folder)
    return store_id(folder)
