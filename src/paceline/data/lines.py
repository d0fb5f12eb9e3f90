"""JSON lines from a file, plain or compressed with gzip or zstd, which are told apart by their first bytes.

A compressed file is read as a stream, so nothing is unpacked to the disk and memory stays flat. The price: a
read that goes back begins at the start of the file.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, cast

from paceline.data.extra import needs_extra
from paceline.data.prompts import BrokenRecordError
from paceline.data.records import Record
from paceline.errors import ConfigError
from paceline.regular_files import open_regular

LINE_BYTES_MAX = 16 << 20
_PIECE = 1 << 20
_PACKED = 2 << 10  # a piece this small unpacks to at most 64 MiB
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


class Lines:
    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compression = _compression(first_bytes(path))

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def described(self) -> str:
        return f"JSON lines, {self.compression}" if self.compression else "JSON lines"

    @property
    def is_stream(self) -> bool:
        return bool(self.compression)

    def identity(self) -> list[Any]:
        try:
            status = self.path.stat()
        except (OSError, ValueError) as error:
            raise unreadable(self.path, error) from error
        return [str(self.path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    def read(self, offset: int = 0, number: int = 1) -> Iterator[Record]:
        """Only a newline ends a line."""
        try:
            with ExitStack() as held:
                file = held.enter_context(open_regular(self.path))
                stream = self._opened(file, held)
                if self.compression:
                    _skip(stream, offset)
                else:
                    file.seek(offset)
                while line := stream.readline(LINE_BYTES_MAX + 1):
                    content, size = _whole(line, stream)
                    if offset == 0 and isinstance(content, bytes):
                        content = content.removeprefix(codecs.BOM_UTF8)
                    yield Record(number, offset, content)
                    number, offset = number + 1, offset + size
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self.path, error) from error

    def _opened(self, file: BinaryIO, held: ExitStack) -> BinaryIO:
        if self.compression == "gzip":
            return cast(BinaryIO, held.enter_context(gzip.GzipFile(fileobj=file)))
        if self.compression == "zstd":
            return cast(BinaryIO, io.BufferedReader(_Pieces(_unpacked(file, self.path)), _PIECE))
        return file


class _Pieces(io.RawIOBase):
    """Pieces of bytes as one stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def _unpacked(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The content of all zstd frames of the file. Raises OSError if one is damaged or cut off."""
    with needs_extra("zstandard", path):
        import zstandard
    try:
        frame, packed = None, file.read(_PACKED)
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            if piece := frame.decompress(packed):
                yield piece
            packed = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
            packed = packed or file.read(_PACKED)
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None:
        raise OSError("it ends within a zstd frame")


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0 and (piece := stream.read(min(count, _PIECE))):
        count -= len(piece)


def _whole(line: bytes, stream: BinaryIO) -> tuple[bytes | BrokenRecordError, int]:
    """The line and its size, or why it is not read: memory must hold a line, but not any line."""
    if len(line) <= LINE_BYTES_MAX:
        return line, len(line)
    digest, size = hashlib.sha256(line), len(line)
    while not line.endswith(b"\n") and (line := stream.readline(_PIECE)):
        digest.update(line)
        size += len(line)
    particulars = f": {size} bytes, more than {LINE_BYTES_MAX}"
    return BrokenRecordError("it is too long", particulars, digest.hexdigest()), size


def first_bytes(path: Path) -> bytes:
    """Raises ConfigError if the file cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(4)
    except OSError as error:
        raise unreadable(path, error) from error


def _compression(start: bytes) -> str:
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")


def unreadable(path: Path | str, reason: object) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({reason}).",
        next="set data.path to a file of prompts or chats, such as prompts/train.jsonl.",
    )
