"""Checks a ledger's path: the type of its filesystem, and that the file is a regular one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from paceline.errors import ConfigError, LedgerError, SchemaError
from paceline.mounts import NETWORK_FILESYSTEMS, filesystem_of


def refuse_network_filesystem(path: Path) -> None:
    """Raise ConfigError if `path` lies on a network filesystem."""
    kind = filesystem_of(path)
    if kind in NETWORK_FILESYSTEMS:
        raise ConfigError(
            f"{path} lies on a network filesystem ({kind}).",
            why="SQLite's write-ahead log needs shared memory and locks that such filesystems do not keep.",
            next="set run.directory to a local disk.",
        )


def regular_file(path: Path) -> os.stat_result | None:
    """The stat of the regular file at `path`; None if there is none.

    Raises SchemaError for anything else (opening a FIFO would block for ever), LedgerError if stat fails.
    The file is not opened: closing it would drop the locks that SQLite holds on it.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LedgerError(
            f"{path} cannot be examined ({error}).",
            why="Without the ledger nothing is known about a run. Nothing was changed.",
            next="check the path and its permissions.",
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise SchemaError(
            f"{path} is not a regular file.",
            why="A ledger is a regular file; opening anything else could block for ever.",
            next="move it away and restore the ledger, or start a new run in another run.directory.",
        )
    return found
