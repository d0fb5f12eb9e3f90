"""The answers of a run as token ids, kept beside it in `answers/`.

The producer writes every sample's tokens, and which of them are answers, before it commits the sample. An
engine that does not repeat its bits captures a lost sample again by prefilling exactly these tokens, and any
other engine does so if the sample came back with others. Another run may train on them (`KeptAnswers`).

Each file covers a range of ordinals and is appended to. A record is its length, one answer (MessagePack), and
a digest of both. The last whole record of an ordinal counts. A crash may leave a torn record at the end; its
sample was not committed, and the next writer cuts it off. If most of a file is records that count no more,
the next writer writes it anew without them. Answers of samples that were never committed are there, too: a
reader of another run's answers asks its ledger which samples were.

Several producers of one host write to the same files, in turns under a file lock. A producer makes sure in
its turn that it is not replaced, so a record of a replaced one stands before every record of its successor.
On several hosts no producer relies on locks: each one's process has files of its own in a folder that they
share (`writer`), and the record of the highest generation counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from paceline.durable_files import make_folder, replace_file, sync_folder, write_whole
from paceline.errors import StoreError
from paceline.mounts import look_anew
from paceline.regular_files import open_regular

ORDINALS_PER_FILE = 4096
SUFFIX = ".answers"
TURNS = "turns.lock"
OPEN_OF_OTHERS = 64  # files that stay open where each producer has its own
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 8


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """A sample's tokens, the last one written included; `spans`: those that are answers, as (start, stop).

    `prompt`: digest of what the sample was captured from. `turns`: the texts of earlier answers that the
    target wrote, in the order of the chat; they need not stand unchanged in the tokens. `conditions`: digest
    of the target and the settings that the answer follows from. `generation`: that of the capture.
    """

    ordinal: int
    task_id: str
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    prompt: str = ""
    turns: tuple[str, ...] = ()
    conditions: str = ""
    generation: int = 0


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Answer)


class _File:
    """An open file: where each ordinal's record begins and ends, and where the last whole record ends.

    While it is open here, no later file gets its inode.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file = open_regular(path)
        self.places: dict[int, tuple[int, int]] = {}
        self.generations: dict[int, int] = {}
        self.end = 0

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def is_at(self, path: Path) -> bool:
        """Whether the path still names this file, and nothing that is known of it was cut off."""
        there, here = path.stat(), os.fstat(self._file.fileno())
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino) and here.st_size >= self.end

    def look(self) -> None:
        """Find what was written since the last look."""
        begin = self.end
        for answer, start, stop in _records(self.read(begin, os.fstat(self._file.fileno()).st_size)):
            self.places[answer.ordinal] = begin + start, begin + stop
            self.generations[answer.ordinal] = answer.generation
            self.end = begin + stop

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file.fileno(), stop - start, start)


class AnswerFiles:
    def __init__(self, folder: Path, writer: str = "") -> None:
        """`writer`: a name that no other process has, if those of other hosts write into the folder, too."""
        self._folder, self._writer = folder, writer
        self._known: dict[Path, _File] = {}  # the newest files
        self._listed: dict[int, list[Path]] = {}  # the files that cover a range, by its number

    def get(self, ordinal: int, *, anew: bool = False) -> Answer | None:
        """The answer that is kept for the prompt; None if there is none. Raises StoreError.

        `anew`: also one that another host has just written.
        """
        number = ordinal // ORDINALS_PER_FILE
        if anew and self._writer:
            look_anew(self._folder)
            self._listed = {}
            for path in filter(lambda path: _number_of(path) == number, self._known):
                with suppress(OSError):  # an open has the client of a network filesystem ask its server
                    open_regular(path).close()
        for _ in range(2):
            path = self._path(number)
            try:
                files = {path: self._file(path) for path in self._paths(number)}
                having = {path: file for path, file in files.items() if file and ordinal in file.places}
                if not having:
                    return None
                path, file = max(having.items(), key=lambda one: one[1].generations[ordinal])
                record = file.read(*file.places[ordinal])
            except OSError as error:
                raise _unreadable(path, error) from error
            for answer, _, _ in _records(record):
                if answer.ordinal == ordinal:
                    return answer
            self._known.pop(path, None)  # it was damaged since
        raise _unreadable(path, f"the record of prompt {ordinal} is damaged")

    def all(self, is_wanted: Callable[[int], bool] = lambda _: True) -> Iterator[Answer]:
        """The answers of these ordinals, in their order. Raises StoreError."""
        for paths in self._all_paths():
            found: dict[int, Answer] = {}
            for answer, _ in _newest(paths):
                found[answer.ordinal] = answer
            for ordinal in sorted(filter(is_wanted, found)):
                yield found[ordinal]

    def digests(self, is_wanted: Callable[[int], bool]) -> dict[int, tuple[bytes, int]]:
        """A digest of each of these answers, and the tokens up to its end, by ordinal. Raises StoreError."""
        found = {}
        for paths in self._all_paths():
            for answer, body in _newest(paths):
                if is_wanted(answer.ordinal):
                    end = answer.spans[-1][1] if answer.spans else len(answer.token_ids)
                    found[answer.ordinal] = _digest(body), end
        return found

    def keep(self, answers: Iterable[Answer], check: Callable[[], object] = lambda: None) -> None:
        """Write answers durably, unless they are kept already. Raises StoreError.

        `check` is called in this process's turn, before anything is written, and may raise.
        """
        new = [answer for answer in answers if not self._is_kept(answer)]
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

    def _is_kept(self, answer: Answer) -> bool:
        """Another host may have written another answer since, of a lower generation: so on several hosts the
        record of an earlier capture is not enough."""
        kept = self.get(answer.ordinal)
        if self._writer and kept is not None and kept.generation != answer.generation:
            return False
        return _is_same(kept, answer)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The kernel ends the turn of a process that dies. A process that has files of its own needs none."""
        make_folder(self._folder)
        if self._writer:
            yield
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._folder / TURNS, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _path(self, number: int) -> Path:
        """The file that this process writes."""
        return self._folder / f"{number:08d}{'-' if self._writer else ''}{self._writer}{SUFFIX}"

    def _paths(self, number: int) -> list[Path]:
        if number not in self._listed:
            self._listed = {_number_of(paths[0]): paths for paths in self._all_paths()}
        return list(dict.fromkeys([*self._listed.get(number, ()), self._path(number)]))

    def _all_paths(self) -> list[list[Path]]:
        """The files of each range, in the order of the ranges."""
        found: dict[int, list[Path]] = {}
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            found.setdefault(_number_of(path), []).append(path)
        return [found[number] for number in sorted(found)]

    def _file(self, path: Path) -> _File | None:
        """The file, after a look at what was written since the last one; None if there is none yet."""
        try:
            known = self._known.get(path)
            if known is None or not known.is_at(path):  # another process may have written the file anew
                self._known.pop(path, None)
                known = _File(path)
            known.look()
        except FileNotFoundError:
            return None
        most = OPEN_OF_OTHERS if self._writer else 1
        while len(self._known) > most and path not in self._known:
            del self._known[min(self._known)]  # one older file stays, for a sample captured again
        self._known[path] = known
        return known

    def _append(self, number: int, answers: list[Answer]) -> None:
        """In this process's turn: behind the last whole record stands what a dead process has torn."""
        path = self._path(number)
        if not path.exists():
            path.touch(mode=0o600)
            sync_folder(self._folder)
        file = self._file(path)
        assert file is not None, "it was there a moment ago, and this process has the turn"
        if 2 * sum(stop - start for start, stop in file.places.values()) < file.end:
            replace_file(path, b"".join(file.read(*place) for place in sorted(file.places.values())))
            file = self._file(path)
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


def _number_of(path: Path) -> int:
    """Of the range that a file covers; -1 for a foreign file."""
    number = path.name.removesuffix(SUFFIX).partition("-")[0]
    return int(number) if number.isdecimal() else -1


def _is_same(kept: Answer | None, answer: Answer) -> bool:
    """Whether they differ in nothing but the capture."""
    return kept is not None and msgspec.structs.replace(kept, generation=answer.generation) == answer


def _newest(paths: Iterable[Path]) -> Iterator[tuple[Answer, bytes]]:
    """The record that counts of each ordinal, and its bytes: the last one of the highest generation."""
    found: dict[int, tuple[Answer, bytes]] = {}
    for path in paths:
        data, of_file = _content(path), dict[int, tuple[Answer, bytes]]()
        for answer, start, stop in _records(data):
            of_file[answer.ordinal] = answer, data[start + _LENGTH.size : stop - _DIGEST_BYTES]
        for ordinal, one in of_file.items():
            if ordinal not in found or one[0].generation > found[ordinal][0].generation:
                found[ordinal] = one
    yield from found.values()


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
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
