"""Files of records, plain or compressed with gzip or zstd, which are told apart by their first bytes.

A compressed file is read as a stream, so nothing is unpacked to the disk and memory stays flat. The price: a
read that goes back begins at the start of the file.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from paceline.data.extra import needs_extra
from paceline.data.prompts import BrokenRecordError
from paceline.errors import ConfigError
from paceline.regular_files import open_regular

RECORD_BYTES_MAX = 16 << 20
PIECE = 1 << 20
_PACKED = 2 << 10  # a piece this small unpacks to at most 64 MiB
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


class RecordFile:
    """What files of records have in common, however the records lie in them (lines.py, elements.py)."""

    kind: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compression = _compression(first_bytes(path))

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def described(self) -> str:
        return f"{self.kind}, {self.compression}" if self.compression else self.kind

    @property
    def is_stream(self) -> bool:
        return bool(self.compression)

    def identity(self) -> list[Any]:
        try:
            status = self.path.stat()
        except (OSError, ValueError) as error:
            raise unreadable(self.path, error) from error
        return [str(self.path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    @contextmanager
    def opened(self, offset: int = 0) -> Iterator[BinaryIO]:
        """The unpacked content from `offset` on. Raises ConfigError, also for what fails while it is read."""
        try:
            with ExitStack() as held:
                file = held.enter_context(open_regular(self.path))
                if not self.compression:
                    file.seek(offset)
                    yield file
                    return
                stream = self._unpacked(file, held)
                _skip(stream, offset)
                yield stream
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self.path, error) from error

    def _unpacked(self, file: BinaryIO, held: ExitStack) -> BinaryIO:
        if self.compression == "gzip":
            return cast(BinaryIO, held.enter_context(gzip.GzipFile(fileobj=file)))
        return cast(BinaryIO, io.BufferedReader(_Pieces(_unpacked(file, self.path)), PIECE))


def too_long(size: int, most: int, digest: str) -> BrokenRecordError:
    """Why a record is not read; `digest`: of all its bytes."""
    return BrokenRecordError("it is too long", f": {size} bytes, more than {most}", digest)


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
    while count > 0 and (piece := stream.read(min(count, PIECE))):
        count -= len(piece)


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
