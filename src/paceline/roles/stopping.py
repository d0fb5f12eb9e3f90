"""Stops the processes of a run on this host, as Ctrl-C in their terminals would.

The locks say which roles are live and name their processes. A process is signalled only if it really has that
lock open: the number may be that of a process in another container, or of one that ended a moment ago.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from paceline.errors import PacelineError
from paceline.ledger.locks import UNKNOWN, live_holder
from paceline.roles.child import WITHOUT_SAFE_POINT
from paceline.roles.process import SUPERVISOR_VARIABLE
from paceline.roles.trainers import known_ranks
from paceline.roles.workers import SUPERVISOR, known_roles


def live_roles(directory: Path) -> list[str]:
    """The roles of the run that are held on this host; the supervisor first, which stops those it started."""
    roles = [SUPERVISOR, *known_roles(directory), *known_ranks(directory), *WITHOUT_SAFE_POINT]
    return [role for role in roles if live_holder(directory, role) is not None]


def stop_role(directory: Path, role: str, *, at_once: bool, look: Callable[[], None]) -> None:
    """Ask the holder of the role to stop at its next safe point, and wait until the role is free.

    `at_once`: ask at every look, and the second signal ends it without a safe point. `look` is called before
    each further look, and takes its time. Raises PacelineError if the process cannot be signalled.
    """
    asked = False
    while (holder := live_holder(directory, role)) is not None:
        if at_once or not asked:
            asked = _ask(directory, role, holder)
        look()


def _ask(directory: Path, role: str, holder: int) -> bool:
    """Whether the process was signalled; not if it has ended meanwhile."""
    try:
        handle = os.pidfd_open(holder) if holder != UNKNOWN else None
    except ProcessLookupError:
        handle = None
    try:
        if handle is None or not _has_open(holder, directory / f"{role}.lock"):
            if live_holder(directory, role) == holder:
                raise _unreachable(directory, role, holder)
            return False
        if role in WITHOUT_SAFE_POINT:
            _signal_starter(holder)
        else:
            signal.pidfd_send_signal(handle, signal.SIGTERM)
    except PermissionError as error:
        raise _forbidden(directory, role, holder) from error
    except (ProcessLookupError, FileNotFoundError):  # its folder in /proc goes with it
        return False
    finally:
        if handle is not None:
            os.close(handle)
    return True


def _signal_starter(pid: int) -> None:
    """A measurement or an export ends with the command that waits for it."""
    name = f"{SUPERVISOR_VARIABLE}=".encode()
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    starter = next((item[len(name) :].decode() for item in environment if item.startswith(name)), "")
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(parent) if starter == parent else pid, signal.SIGTERM)


def _has_open(pid: int, path: Path) -> bool:
    """Raises PermissionError if the process is another user's; ProcessLookupError."""
    wanted = path.stat()
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError as error:
        raise ProcessLookupError from error
    for descriptor in descriptors:
        with suppress(FileNotFoundError):
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _unreachable(directory: Path, role: str, holder: int) -> PacelineError:
    return PacelineError(
        f"The {role} of the run in {directory} is live, and its process ({holder or 'unnamed'}) is not here.",
        why="It runs in another container of this host, or its lock file was changed.",
        next="run the same command where it was started.",
    )


def _forbidden(directory: Path, role: str, holder: int) -> PacelineError:
    return PacelineError(
        f"The {role} of the run in {directory} (process {holder}) belongs to another user.",
        why="Only that user may stop it. Nothing was changed.",
        next=f"run the same command as the user of process {holder}.",
    )
