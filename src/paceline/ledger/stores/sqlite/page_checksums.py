"""A checksum on every page of the database, checked on every read: a flipped bit is an error, not a value.

SQLite itself believes what it reads. Its checksum file layer (cksumvfs, compiled into apsw's wheels) keeps
eight bytes of each page for a checksum. Who writes such a database must do so through that layer.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import apsw
from apsw import sqlite_extra

from paceline.errors import SchemaError

LAYER = "cksmvfs"
RESERVED_BYTES = 8
RESERVED_AT = 20  # place in the database header


@cache
def checksum_layer() -> str | None:
    """The name of the file layer, registered in this process; None if this apsw was built without."""
    if sqlite_extra.has("cksumvfs") is None:
        return None
    connection = apsw.Connection(":memory:")
    connection.enable_load_extension(True)
    sqlite_extra.load(connection, "cksumvfs")
    connection.close()
    return LAYER


def refuse_unchecked(path: Path) -> None:
    """Raise SchemaError if the database has checksums that this process could not keep."""
    if checksum_layer() is not None or not path.exists():
        return
    header = path.read_bytes()[: RESERVED_AT + 1]
    if len(header) > RESERVED_AT and header[RESERVED_AT] == RESERVED_BYTES:
        raise SchemaError(
            f"{path} has a checksum on every page, and this apsw cannot keep them.",
            why="A page written without would look damaged to everybody else.",
            next="pip install --force-reinstall --only-binary=:all: apsw",
        )
