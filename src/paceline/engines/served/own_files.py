"""Files that another process of this user leaves in a folder: opened without trust, and removed.

A name is opened only below the folder's own descriptor, as a regular file of this user, and never through a
link, so that nothing that a server or another user puts there leads a reader elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from paceline.engines.served.http import TryAgainError, stopped
from paceline.errors import CaptureMismatchError

OTHERS_MAY_WRITE = 0o022
LOOK_S = 0.01


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """The folder's descriptor. Raises TryAgainError, or CaptureMismatchError if others may change it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TryAgainError(f"{folder} cannot be opened ({error.strerror})") from error
    try:
        facts = os.fstat(fd)
        if facts.st_uid != os.geteuid() or facts.st_mode & OTHERS_MAY_WRITE:
            raise foreign(f"Other users may write to {folder}")
        yield fd
    finally:
        os.close(fd)


def wait_until(is_done: Callable[[], bool], wait_s: float, should_stop: Callable[[], bool], why: str) -> None:
    """Look again and again. Raises TryAgainError with `why` after `wait_s`; a stop is an error, too."""
    deadline = time.monotonic() + wait_s
    while not is_done():
        if should_stop():
            raise stopped()
        if time.monotonic() > deadline:
            raise TryAgainError(why)
        time.sleep(LOOK_S)


def open_own(folder: int, name: str) -> int:
    """Open a regular file of this user. Raises FileNotFoundError, CaptureMismatchError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "a link" if error.errno == errno.ELOOP else error.strerror
        raise foreign(f"{name} is not a regular file ({what})") from error
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        os.close(fd)
        raise foreign(f"{name} is not a regular file of user {os.geteuid()}")
    return fd


def read_own(folder: int, name: str, limit: int) -> bytes:
    """The whole content. Raises TryAgainError if it is missing, CaptureMismatchError if it is too long."""
    try:
        fd = open_own(folder, name)
    except FileNotFoundError as error:
        raise TryAgainError(f"the server ended its write of {name}, and there is no file") from error
    with os.fdopen(fd, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise foreign(f"{name} has more than the {limit} bytes of its tokens")
    return data


def remove_own(folder: int, *names: str) -> None:
    """Remove these names, where they are."""
    for each in names:
        with suppress(OSError):
            os.unlink(each, dir_fd=folder)


def own_prefix(run: Path) -> str:
    """How the ids of a run's requests begin, and so the names of their files. `run`: its directory."""
    return f"paceline-{hashlib.blake2b(str(run.absolute()).encode(), digest_size=6).hexdigest()}"


def sweep(folder: Path, prefix: str, suffixes: tuple[str, ...], older_than_s: float = 0.0) -> int:
    """Remove files of a run's requests that no producer waits for any more; their number.

    The folder may be the user's own and hold anything else: only names with the run's `prefix` are removed.
    """
    removed, before = 0, time.time() - older_than_s
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.name.startswith(prefix) and entry.name.endswith(suffixes)):
                continue
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                if facts.st_uid == os.geteuid() and facts.st_mtime <= before:
                    Path(entry.path).unlink()
                    removed += 1
    return removed


def foreign(what: str) -> CaptureMismatchError:
    return CaptureMismatchError(
        f"{what}.",
        why="Only files that the run's own server wrote, in the run's layout, may be trained on.",
        next="start the server as `paceline engine NAME RUN.yaml` prints, as the same user.",
    )
