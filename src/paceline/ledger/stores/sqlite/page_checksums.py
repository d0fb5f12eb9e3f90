"""A checksum on every page of the database, checked on every read: a flipped bit is an error, not a value.

SQLite itself believes what it reads. Its checksum file layer (cksumvfs, compiled into apsw's wheels) keeps
eight bytes of each page for a checksum. Who writes such a database must do so through that layer: pages
get their checksum on the way from the write-ahead log into the database, so any other program that opens
a ledger after a crash, if only to read it, and empties the log leaves pages without. `accept_pages` mends.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path

import apsw
from apsw import sqlite_extra

from paceline.durable_files import replace_file
from paceline.errors import SchemaError

LAYER = "cksmvfs"
RESERVED_BYTES = 8
RESERVED_AT = 20  # place in the database header
PAGE_BYTES = 4096  # SQLite's default, which a ledger is made with


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
    """Raise SchemaError if the database has checksums that would not be checked.

    Either this process cannot keep them, or the one byte that tells SQLite of them is damaged: then
    every other page would be believed again.
    """
    page = _first_page(path)
    if page is None:
        return
    marked = page[RESERVED_AT] == RESERVED_BYTES
    if marked and checksum_layer() is None:
        raise SchemaError(
            f"{path} has a checksum on every page, and this apsw cannot keep them.",
            why="A page written without would look damaged to everybody else.",
            next="pip install --force-reinstall --only-binary=:all: apsw",
        )
    page[RESERVED_AT] = RESERVED_BYTES
    if not marked and page_checksum(page) == page[-RESERVED_BYTES:]:
        raise SchemaError(
            f"{path} is damaged: byte {RESERVED_AT} is not as it was written.",
            why="It says that pages have checksums; without it no page would be checked.",
            next="restore it from a backup, or start a new run in another run.directory.",
        )


def _first_page(path: Path) -> bytearray | None:
    """Read through SQLite's own file layer: closing a file that was opened by hand drops every lock that
    another connection of this process holds on it (fcntl(2)); None if there is no whole page."""
    if not path.exists():
        return None
    flags = apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_READONLY
    file = apsw.VFSFile("unix", str(path.resolve()), [flags, 0])
    try:
        return bytearray(file.xRead(PAGE_BYTES, 0)) if file.xFileSize() >= PAGE_BYTES else None
    finally:
        file.xClose()


def accept_pages(path: Path) -> int:
    """Give each page the checksum of what it holds now; how many had another. No one may have it open.

    For a ledger that another program has written to. Raises SchemaError, changing nothing, if SQLite
    finds the content itself damaged; OSError.
    """
    plain = apsw.Connection(str(path), vfs="unix")
    try:
        problems = [str(row[0]) for row in plain.execute("PRAGMA integrity_check(5)")]
        if problems == ["ok"]:
            plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except apsw.Error as error:
        problems = [str(error)]
    finally:
        plain.close()
    if problems != ["ok"]:
        raise SchemaError(
            f"The content of {path} is damaged: {'; '.join(problems)}.",
            why="New checksums would only hide that. Nothing was changed.",
            next="restore it from a backup, or start a new run in another run.directory.",
        )
    data = bytearray(path.read_bytes())
    accepted = 0
    if data[RESERVED_AT] == RESERVED_BYTES:
        for end in range(PAGE_BYTES, len(data) + 1, PAGE_BYTES):
            found = page_checksum(data[end - PAGE_BYTES : end])
            if found != data[end - RESERVED_BYTES : end]:
                data[end - RESERVED_BYTES : end] = found
                accepted += 1
        replace_file(path, bytes(data))
    return accepted


def page_checksum(page: bytes | bytearray) -> bytes:
    """That of cksumvfs (sqlite.org/cksumvfs.html): two sums over the 32-bit words before it."""
    words = struct.unpack(f"<{(len(page) - RESERVED_BYTES) // 4}I", page[:-RESERVED_BYTES])
    one = two = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        one = (one + even + two) & 0xFFFFFFFF
        two = (two + odd + one) & 0xFFFFFFFF
    return struct.pack("<II", one, two)
