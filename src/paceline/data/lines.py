"""JSON lines of a file."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from typing import BinaryIO

from paceline.data.packed import PIECE, RECORD_BYTES_MAX, RecordFile, too_long
from paceline.data.prompts import BrokenRecordError
from paceline.data.records import Record


class Lines(RecordFile):
    unit = "line"
    kind = "JSON lines"

    def read(self, offset: int = 0, number: int = 1) -> Iterator[Record]:
        """Only a newline ends a line."""
        with self.opened(offset) as stream:
            while line := stream.readline(RECORD_BYTES_MAX + 1):
                content, size = _whole(line, stream)
                if offset == 0 and isinstance(content, bytes):
                    content = content.removeprefix(codecs.BOM_UTF8)
                yield Record(number, offset, content)
                number, offset = number + 1, offset + size


def _whole(line: bytes, stream: BinaryIO) -> tuple[bytes | BrokenRecordError, int]:
    """The line and its size, or why it is not read: memory must hold a line, but not any line."""
    if len(line) <= RECORD_BYTES_MAX:
        return line, len(line)
    digest, size = hashlib.sha256(line), len(line)
    while not line.endswith(b"\n") and (line := stream.readline(PIECE)):
        digest.update(line)
        size += len(line)
    return too_long(size, RECORD_BYTES_MAX, digest.hexdigest()), size
