"""The answers of a run as token ids, kept beside it in `answers/`.

The producer writes every sample's tokens, and which of them are answers, before it commits the sample. An
engine that does not repeat its bits captures a lost sample again by prefilling exactly these tokens, and any
other engine does so if the sample came back with others. Another run may train on them (`KeptAnswers`).

Each file covers a range of ordinals and is appended to. A record is its length, one answer (MessagePack), and
a digest of both. The last whole record of an ordinal counts. A crash may leave a torn record at the end; its
sample was not committed, and the next writer cuts it off. If most of a file is records that count no more,
the next writer writes it anew without them. Answers of samples that were never committed are there, too: who
reads another run's answers asks its ledger which samples were.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from paceline.durable_files import make_folder, replace_file, sync_folder, write_whole
from paceline.errors import StoreError

ORDINALS_PER_FILE = 4096
SUFFIX = ".answers"
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


class AnswerFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # By file number, of the newest file and one older: where each ordinal's record begins and ends.
        self._known: dict[int, dict[int, tuple[int, int]]] = {}
        self._whole: dict[int, int] = {}  # files that this process knows to end with a whole record: the end

    def get(self, ordinal: int) -> Answer | None:
        """The answer that is kept for the prompt; None if there is none. Raises StoreError."""
        number = ordinal // ORDINALS_PER_FILE
        for _ in range(2):
            place = self._file(number).get(ordinal)
            if place is None:
                return None
            try:
                with self._path(number).open("rb") as file:
                    record = os.pread(file.fileno(), place[1] - place[0], place[0])
            except OSError as error:
                raise _unreadable(self._path(number), error) from error
            for answer, _, _ in _records(record):
                if answer.ordinal == ordinal:
                    return answer
            del self._known[number]  # another process, the run's own, may have written the file anew
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

    def keep(self, answers: Iterable[Answer]) -> None:
        """Write answers durably, unless they are kept already. Raises StoreError."""
        by_file: dict[int, list[Answer]] = {}
        for answer in answers:
            if self.get(answer.ordinal) != answer:
                by_file.setdefault(answer.ordinal // ORDINALS_PER_FILE, []).append(answer)
        try:
            for number, new in by_file.items():
                self._append(number, new)
        except OSError as error:
            raise StoreError(
                f"The answers in {self._folder} cannot be written ({error}).",
                why="Each answer is kept before its sample is committed.",
                next="check that disk, then run the same command again; nothing was committed.",
            ) from error

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}{SUFFIX}"

    def _file(self, number: int) -> dict[int, tuple[int, int]]:
        if number not in self._known:
            while len(self._known) > 1:  # beside the newest, one older file for a sample captured again
                del self._known[min(self._known)]
            records = _records(_content(self._path(number)))
            self._known[number] = {answer.ordinal: (start, stop) for answer, start, stop in records}
        return self._known[number]

    def _append(self, number: int, answers: list[Answer]) -> None:
        if number not in self._whole:
            self._mend(number)
        known = self._file(number)
        at, data, places = self._whole.pop(number), b"", {}  # known again when the write has succeeded
        for answer in answers:
            body = _ENCODER.encode(answer)
            record = _LENGTH.pack(len(body)) + body
            record += _digest(record)
            places[answer.ordinal] = at + len(data), at + len(data) + len(record)
            data += record
        fd = os.open(self._path(number), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            write_whole(fd, data)
        finally:
            os.close(fd)
        self._whole[number] = at + len(data)
        known.update(places)

    def _mend(self, number: int) -> None:
        """Cut a torn record off, or write the file anew if less than half of it counts."""
        path = self._path(number)
        if not path.exists():
            make_folder(self._folder)
            path.touch(mode=0o600)
            sync_folder(self._folder)
        data = _content(path)
        records = list(_records(data))
        places = sorted({answer.ordinal: (start, stop) for answer, start, stop in records}.values())
        end, size = max((stop for _, _, stop in records), default=0), sum(b - a for a, b in places)
        if 2 * size < end:
            replace_file(path, b"".join(data[start:stop] for start, stop in places))
            self._known.pop(number, None)
            end = size
        else:
            os.truncate(path, end)
        self._whole[number] = end


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
