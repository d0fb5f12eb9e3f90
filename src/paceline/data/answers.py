"""The answers of a run as token ids, kept beside it in `answers/`.

The producer writes every sample's tokens, and which of them are answers, before it commits the sample. An
engine that does not repeat its bits captures a lost sample again by prefilling exactly these tokens, and any
other engine does so if the sample came back with others. Another run may train on them (`KeptAnswers`).

Each file covers a range of ordinals and is appended to. A record is its length, one answer (MessagePack), and
a digest of both. The last whole record of an ordinal counts. A crash may leave a torn record at the end; its
sample was not committed, and the next writer cuts it off. If most of a file is records that count no more,
the next writer writes it anew without them. Answers of samples that were never committed are there, too: who
reads another run's answers asks its ledger which samples were.

Several producers write to the same files, in turns under a file lock. A producer makes sure in its turn that
it is not replaced, so a record of a replaced one stands before every record of its successor.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from paceline.durable_files import make_folder, replace_file, sync_folder, write_whole
from paceline.errors import StoreError

ORDINALS_PER_FILE = 4096
SUFFIX = ".answers"
TURNS = "turns.lock"
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 8


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """A sample's tokens, the last one written included; `spans`: those that are answers, as (start, stop).

    `prompt`: digest of what the sample was captured from. `turns`: the texts of earlier answers that the
    target wrote, in the order of the chat; they need not stand unchanged in the tokens. `conditions`: digest
    of the target and the settings that the answer follows from.
    """

    ordinal: int
    task_id: str
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    prompt: str = ""
    turns: tuple[str, ...] = ()
    conditions: str = ""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Answer)


class _File:
    """An open file: where each ordinal's record begins and ends, and where the last whole record ends.

    While it is open here, no later file gets its inode.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.places: dict[int, tuple[int, int]] = {}
        self.end = 0

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def is_at(self, path: Path) -> bool:
        """Whether the path still names this file, and nothing that is known of it was cut off."""
        there, here = path.stat(), os.fstat(self._fd)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino) and here.st_size >= self.end

    def look(self) -> None:
        """Find what was written since the last look."""
        begin = self.end
        for answer, start, stop in _records(self.read(begin, os.fstat(self._fd).st_size)):
            self.places[answer.ordinal] = begin + start, begin + stop
            self.end = begin + stop

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._fd, stop - start, start)


class AnswerFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, _File] = {}  # by file number, of the newest file and one older

    def get(self, ordinal: int) -> Answer | None:
        """The answer that is kept for the prompt; None if there is none. Raises StoreError."""
        number = ordinal // ORDINALS_PER_FILE
        for _ in range(2):
            try:
                file = self._file(number)
                if file is None or ordinal not in file.places:
                    return None
                record = file.read(*file.places[ordinal])
            except OSError as error:
                raise _unreadable(self._path(number), error) from error
            for answer, _, _ in _records(record):
                if answer.ordinal == ordinal:
                    return answer
            del self._known[number]  # it was damaged since
        raise _unreadable(self._path(number), f"the record of prompt {ordinal} is damaged")

    def all(self, is_wanted: Callable[[int], bool] = lambda _: True) -> Iterator[Answer]:
        """The answers of these ordinals, in their order. Raises StoreError."""
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            found = {answer.ordinal: answer for answer, _, _ in _records(_content(path))}
            for ordinal in sorted(filter(is_wanted, found)):
                yield found[ordinal]

    def digests(self, is_wanted: Callable[[int], bool]) -> dict[int, tuple[bytes, int]]:
        """A digest of each of these answers, and the tokens up to its end, by ordinal. Raises StoreError."""
        found = {}
        for path in self._folder.glob(f"*{SUFFIX}"):
            data = _content(path)
            for answer, start, stop in _records(data):
                if is_wanted(answer.ordinal):
                    end = answer.spans[-1][1] if answer.spans else len(answer.token_ids)
                    body = data[start + _LENGTH.size : stop - _DIGEST_BYTES]
                    found[answer.ordinal] = _digest(body), end
        return found

    def keep(self, answers: Iterable[Answer], check: Callable[[], object] = lambda: None) -> None:
        """Write answers durably, unless they are kept already. Raises StoreError.

        `check` is called in this process's turn, before anything is written, and may raise.
        """
        new = [answer for answer in answers if self.get(answer.ordinal) != answer]
        if not new:
            return
        by_file: dict[int, list[Answer]] = {}
        try:
            with self._turn():
                check()
                for answer in new:
                    by_file.setdefault(answer.ordinal // ORDINALS_PER_FILE, []).append(answer)
                for number, of_file in by_file.items():
                    self._append(number, of_file)
        except OSError as error:
            raise StoreError(
                f"The answers in {self._folder} cannot be written ({error}).",
                why="Each answer is kept before its sample is committed.",
                next="check that disk, then run the same command again; nothing was committed.",
            ) from error

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The kernel ends the turn of a process that dies."""
        make_folder(self._folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._folder / TURNS, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}{SUFFIX}"

    def _file(self, number: int) -> _File | None:
        """The file, after a look at what was written since the last one; None if there is none yet."""
        path = self._path(number)
        try:
            known = self._known.get(number)
            if known is None or not known.is_at(path):  # another process may have written the file anew
                self._known.pop(number, None)
                known = _File(path)
            known.look()
        except FileNotFoundError:
            return None
        while len(self._known) > 1 and number not in self._known:
            del self._known[min(self._known)]  # one older file stays, for a sample captured again
        self._known[number] = known
        return known

    def _append(self, number: int, answers: list[Answer]) -> None:
        """In this process's turn: behind the last whole record stands what a dead process has torn."""
        path = self._path(number)
        if not path.exists():
            path.touch(mode=0o600)
            sync_folder(self._folder)
        file = self._file(number)
        assert file is not None, "it was there a moment ago, and this process has the turn"
        if 2 * sum(stop - start for start, stop in file.places.values()) < file.end:
            replace_file(path, b"".join(file.read(*place) for place in sorted(file.places.values())))
            file = self._file(number)
            assert file is not None
        records = []
        for answer in answers:
            body = _ENCODER.encode(answer)
            record = _LENGTH.pack(len(body)) + body
            records.append(record + _digest(record))
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, file.end)
            write_whole(fd, b"".join(records))
        finally:
            os.close(fd)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _unreadable(path, error) from error


def _records(data: bytes) -> Iterator[tuple[Answer, int, int]]:
    """Each whole record, and where it begins and ends; damaged records are skipped."""
    at = 0
    while len(data) - at >= _LENGTH.size:
        body = at + _LENGTH.size
        stop = body + _LENGTH.unpack_from(data, at)[0]
        end = stop + _DIGEST_BYTES
        if end <= len(data) and _digest(data[at:stop]) == data[stop:end]:
            yield _DECODER.decode(data[body:stop]), at, end
        at = end


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()


def _unreadable(path: Path, error: object) -> StoreError:
    return StoreError(
        f"The answers in {path} cannot be read ({error}).",
        why="A lost sample must be captured again with the tokens that were written first.",
        next="check that disk, then run the same command again.",
    )
