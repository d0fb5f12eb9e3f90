"""StreamingRefChannel: an append-only log of refs in one file, across processes.

A record is one line, `crc32 json`. A reader takes only whole lines with the right checksum, so it never
reads a torn write as a record. A writer ends the last line before it appends, even a line that looks whole
(after a failed fsync the disk may hold something else), so no fragment can join the next record. Both
counters are durable and exact over restarts: published = records in the file, consumed = a sidecar file that
is written under a temporary name, fsynced and renamed.

A damaged line is either the rest of a torn write, whose publish never returned, or damage to published refs.
Notes, `crc32 @start end` in bytes of the file, tell these apart. Each append begins with a note that closes
the past (`start` = `end`): a damaged line before it that no note covers is a torn write and is skipped. After
its fsync the append writes a note that covers it: a damaged line in that range is an error. A reader stops
at a damaged line until a note decides.
"""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from paceline.durable_files import make_folder, replace_file, sync_folder
from paceline.errors import LedgerError
from paceline.types import SampleRef, ref_from_json, ref_to_json

POLL_S = 0.003


class StreamingRefChannel:
    """One end of the channel in one process. `path` and its sidecars lie in one folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._advising("be made"):
            make_folder(self.path.parent)
        self._closed_path = self.path.with_name(self.path.name + ".closed")
        self._consumed_path = self.path.with_name(self.path.name + ".consumed")
        self._reading = _Tail(self.path)
        self._counting = _Tail(self.path)
        self._published = 0
        self._consumed = 0
        self._marked: int | None = None  # the count that this object has made durable
        self._backlog: list[bytes] = []
        self._is_named = False  # whether this object has synced the file's name

    # -- writer ----------------------------------------------------------------------------

    def publish(self, ref: SampleRef) -> None:
        self.publish_many([ref])

    def publish_many(self, refs: Sequence[SampleRef]) -> None:
        """Append all refs with one write and one fsync.

        Raises TypeError for a tensor, LedgerError for a disk error. After a disk error any of the refs may
        be in the channel; publish them again, because readers drop second copies.
        """
        if not refs:
            return
        if self.is_closed():
            raise LedgerError(
                f"The channel {self.path} was closed; {len(refs)} refs were not published.",
                why="Readers may already have ended.",
                next="open a new channel for more refs.",
            )
        records = b"".join(_line(ref_to_json(ref).encode()) for ref in refs)
        try:
            self._append(records)
        except OSError as error:
            raise LedgerError(
                f"{len(refs)} refs may not be on the disk: {self.path} cannot be written ({error}).",
                why="A reader could miss them.",
                next="check that disk and publish the same refs again; readers drop second copies.",
            ) from error

    def _append(self, records: bytes) -> None:
        """Append these records, or without any only the note that closes the past."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            start = os.fstat(fd).st_size
            _write_all(fd, b"\n" + _note(start, start) + records)
            os.fsync(fd)
            # The note is not synced: if a power loss removes it, the records it covers remain.
            _write_all(fd, b"\n" + _note(start, os.fstat(fd).st_size))
        finally:
            os.close(fd)
        if not self._is_named:  # the process that created the file may have died before this
            sync_folder(self.path.parent)
            self._is_named = True

    def close(self) -> None:
        """Write the end-of-stream mark durably. Idempotent."""
        with self._advising("be closed"):
            if self.path.exists() and not self.is_closed():
                self._append(b"")  # no later writer will decide about a torn write
            fd = os.open(self._closed_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            sync_folder(self.path.parent)

    @property
    def published(self) -> int:
        """Whole records in the file, from all writers."""
        self._published += len(self._counting.records())
        return self._published

    def consumed_remote(self) -> int:
        """The count in the sidecar; 0 if it is missing or empty. Raises LedgerError if it is damaged."""
        try:
            content = self._consumed_path.read_bytes()
        except FileNotFoundError:
            return 0
        checksum, _, number = content.partition(b" ")
        if content and _checksum(number) != checksum:
            raise LedgerError(
                f"The count of consumed refs, {self._consumed_path}, is damaged.",
                why="With a wrong count the producer would wait for ever or run ahead.",
                next="start the trainer again: it writes a new count.",
            )
        return int(number or 0)

    def in_flight_remote(self) -> int:
        return self.published - self.consumed_remote()

    # -- reader ----------------------------------------------------------------------------

    def is_closed(self) -> bool:
        return self._closed_path.exists()

    def poll(self, max_n: int | None = None) -> list[SampleRef]:
        self._backlog += self._reading.records()
        n = len(self._backlog) if max_n is None else max_n
        taken, self._backlog = self._backlog[:n], self._backlog[n:]
        return [ref_from_json(record) for record in taken]

    def mark_consumed(self, n: int) -> None:
        self._consumed += n
        if self._consumed == self._marked:
            return
        number = str(self._consumed).encode()
        with self._advising("count what was consumed"):
            replace_file(self._consumed_path, _checksum(number) + b" " + number)
        self._marked = self._consumed

    @contextmanager
    def _advising(self, what: str) -> Iterator[None]:
        """Turn a disk error into a LedgerError that says what the channel could not do."""
        try:
            yield
        except OSError as error:
            raise LedgerError(
                f"The channel {self.path} cannot {what} ({error}).",
                why="What was published before is untouched.",
                next="check that disk and run the same command again.",
            ) from error

    def change_mark(self) -> int:
        size = self.path.stat().st_size if self.path.exists() else 0
        return 2 * size + self.is_closed()

    def wait(self, seen: int, timeout_s: float) -> int:
        """Checks every few milliseconds."""
        deadline = time.monotonic() + timeout_s
        while (now := self.change_mark()) == seen and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))
        return now


class _Tail:
    """Reads the whole records that were appended to a file since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def records(self) -> list[bytes]:
        """Raises LedgerError at a damaged line that was published."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        lines = data[: data.rfind(b"\n") + 1].split(b"\n")[
            :-1
        ]  # text after the last newline is not whole yet
        taken = []
        for number, line in enumerate(lines):
            content = _content(line)
            if content is None and not self._is_torn(line, lines[number + 1 :]):
                break
            if content and not content.startswith(NOTE):
                taken.append(content)
            self._offset += len(line) + 1
        return taken

    def _is_torn(self, line: bytes, later: list[bytes]) -> bool:
        """Whether the damaged line at the offset is a torn write; False while no note decides."""
        end = self._offset + len(line)
        notes = [content[1:].split() for content in map(_content, later) if content and content[:1] == NOTE]
        spans = [(int(first), int(last)) for first, last in notes]
        if any(first < end and self._offset < last for first, last in spans):
            raise LedgerError(
                f"The channel {self._path} is damaged: bytes {self._offset} to {end} are not as published.",
                why="Refs in them cannot be read; going on would drop them without a word.",
                next="copy the file back from a backup, or publish all refs into a new channel.",
            )
        return any(first >= end for first, _ in spans)


NOTE = b"@"


def _note(start: int, end: int) -> bytes:
    return _line(b"%s%d %d" % (NOTE, start, end))


def _line(content: bytes) -> bytes:
    return _checksum(content) + b" " + content + b"\n"


def _content(line: bytes) -> bytes | None:
    """b"" of an empty line, None of a damaged one."""
    checksum, _, content = line.partition(b" ")
    return content if not line or _checksum(content) == checksum else None


def _checksum(data: bytes) -> bytes:
    return b"%08x" % zlib.crc32(data)


def _write_all(fd: int, data: bytes) -> None:
    written = os.write(fd, data)
    if written != len(data):
        raise LedgerError(
            f"Only {written} of {len(data)} bytes of refs could be written.",
            why="The disk is probably full. Readers ignore the torn record, so nothing wrong is read.",
            next="free space and publish the same refs again; readers drop second copies.",
        )
