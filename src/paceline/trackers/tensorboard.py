"""TensorBoard's event files, written without TensorBoard: a scalar summary a figure.

A file is a sequence of records: length (uint64), its checksum, an Event message of Protocol Buffers, its
checksum; all little-endian, the checksums CRC-32C rotated and offset. Formats: tensorflow/core/lib/io/
record_writer and tensorflow/core/util/event.proto. A torn last record, as a kill leaves it, ends a file for
every reader; each start writes a file of its own.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from paceline.regular_files import read_regular
from paceline.trackers.tracker import Point, TrackedRun

FILE_BYTES_MAX = 1 << 30
VERSION = b"brain.Event:2"
POLYNOMIAL = 0x82F63B78  # of CRC-32C, reversed


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


CRCS = _crc_table()


class TensorBoard:
    """`tensorboard --logdir DIR` shows the run's folder `tensorboard`."""

    def __init__(self, run: TrackedRun) -> None:
        """Raises OSError if the folder cannot be written."""
        self._folder = run.directory / "tensorboard" / run.key
        self._folder.mkdir(parents=True, exist_ok=True)
        self._newest = _newest(self._folder)
        self._file: BinaryIO | None = None

    def newest(self) -> Mapping[str, int]:
        return self._newest

    def write(self, points: Sequence[Point]) -> None:
        file = self._file = self._file or _begun(self._folder)
        for point in points:
            file.write(record(event(point)))
        file.flush()
        os.fsync(file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _begun(folder: Path) -> BinaryIO:
    """A file of this process; it tells its version first."""
    now = time.time_ns()
    file = (folder / f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{now}").open("xb")
    file.write(record(_double(1, now / 1e9) + _bytes(3, VERSION)))
    return file


def event(point: Point) -> bytes:
    """An Event: wall_time (1), step (2), summary (5) of values (1), each of tag (1) and simple_value (2)."""
    values = b"".join(
        _bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in point.named.items()
    )
    return _double(1, point.time) + _int(2, point.step) + _bytes(5, values)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRCS[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


# -- what is there already -----------------------------------------------------------------


def _newest(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        with suppress(OSError, ValueError, IndexError, struct.error):
            for data in records(read_regular(path, FILE_BYTES_MAX)):
                fields = dict(fields_of(data))
                for _, value in fields_of(fields.get(5, b"")):
                    series = dict(fields_of(value))[1].decode().partition("/")[0]
                    found[series] = max(found.get(series, -1), int.from_bytes(fields.get(2, b""), "little"))
    return found


def records(data: bytes) -> Iterator[bytes]:
    """The whole records of a file, up to the first torn one."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        if data[at + 8 : at + 12] != _checksum(data[at : at + 8]) or len(body) < length:
            return
        if data[at + 12 + length : at + 16 + length] != _checksum(body):
            return
        yield body
        at += 16 + length


# -- Protocol Buffers ----------------------------------------------------------------------


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _double(number: int, value: float) -> bytes:
    return _varint(number << 3 | 1) + struct.pack("<d", value)


def _float(number: int, value: float) -> bytes:
    limit = 3.4028234e38  # the greatest of 32 bits
    return _varint(number << 3 | 5) + struct.pack("<f", max(-limit, min(limit, value)))


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def fields_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field; an integer as little-endian bytes. Raises ValueError, IndexError."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value.to_bytes(10, "little")
            continue
        if kind == 2:
            size, at = _read_varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
