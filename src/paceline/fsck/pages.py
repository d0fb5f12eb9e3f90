"""The checksums of a ledger's pages (sqlite.org/cksumvfs.html), computed by the checker's own code.

Eight bytes at the end of each page hold two sums over its 32-bit words, in a database whose header says
so. SQLite's own consistency check does not look at them, nor does a program without that file layer.
"""

from __future__ import annotations

from array import array
from pathlib import Path

RESERVED = 8
LOOKS = 3  # at a page of a live ledger, which may be in the middle of being written


def damaged_pages(path: Path) -> list[int]:
    """Numbers, from 1, of the pages that are not as they were written. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        header = file.read(100)
        if len(header) < 100 or header[20] != RESERVED:
            return []  # an earlier version's, without checksums
        size = int.from_bytes(header[16:18], "big")
        size = 65536 if size == 1 else size
        count = path.stat().st_size // size
        found = []
        for number in range(count):
            for _ in range(LOOKS):
                file.seek(number * size)
                page = file.read(size)
                if len(page) < size or checksum(page) == page[-RESERVED:]:
                    break
            else:
                found.append(number + 1)
        return found


def checksum(page: bytes) -> bytes:
    """Of a page whose words are little-endian, as all machines that Paceline runs on keep them."""
    words = array("I", page[:-RESERVED])
    one = two = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        one = (one + even + two) & 0xFFFFFFFF
        two = (two + odd + one) & 0xFFFFFFFF
    return one.to_bytes(4, "little") + two.to_bytes(4, "little")
