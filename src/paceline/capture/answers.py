"""The answers of a run as token ids, kept beside it: for engines that do not repeat their bits.

Such an engine (continuous batching, say) may write different tokens when it answers a prompt again. So the
producer writes every sample's tokens to disk before it commits the sample, and captures a lost sample again
by prefilling exactly those tokens: a run trains on the text that was written first.

Each file is append-only and covers a range of ordinals. A record holds one sample: its ordinal, how many of
its tokens are the prompt's, all its tokens, and a digest. The first record of an ordinal counts. A crash may
leave a torn record at the end; its sample was not committed, and the next writer cuts it off.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from paceline.durable_files import make_folder, sync_folder, write_whole
from paceline.errors import StoreError

ORDINALS_PER_FILE = 4096
_HEAD = struct.Struct("<QII")  # ordinal, tokens of the prompt, tokens in all
_DIGEST_BYTES = 8


@dataclass(frozen=True)
class Answer:
    """A sample's tokens, including the last one written; the first `num_given` of them are the prompt."""

    ordinal: int
    num_given: int
    token_ids: tuple[int, ...]


class AnswerFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, dict[int, Answer]] = {}  # by file number; the newest file and one older
        self._whole: set[int] = set()  # files that this process knows to end with a whole record

    def get(self, ordinal: int) -> Answer | None:
        """The answer that was first written for the prompt; None if there is none."""
        return self._file(ordinal // ORDINALS_PER_FILE).get(ordinal)

    def keep(self, answers: Iterable[Answer]) -> None:
        """Write answers durably; one that is already there stays as it is. Raises StoreError."""
        by_file: dict[int, list[Answer]] = {}
        for answer in answers:
            if self.get(answer.ordinal) is None:
                by_file.setdefault(answer.ordinal // ORDINALS_PER_FILE, []).append(answer)
        try:
            for number, new in by_file.items():
                self._append(number, b"".join(_record(answer) for answer in new))
                self._known[number].update({answer.ordinal: answer for answer in new})
        except OSError as error:
            raise StoreError(
                f"The answers in {self._folder} cannot be written ({error}).",
                why="This engine may answer differently next time, so each answer is kept before its commit.",
                next="check that disk, then run the same command again; nothing was committed.",
            ) from error

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.tokens"

    def _file(self, number: int) -> dict[int, Answer]:
        if number not in self._known:
            while len(self._known) > 1:  # beside the newest, one older file for a sample captured again
                del self._known[min(self._known)]
            records = _whole_records(self._read(number))
            known: dict[int, Answer] = {}
            for answer, _ in records:
                known.setdefault(answer.ordinal, answer)
            self._known[number] = known
        return self._known[number]

    def _read(self, number: int) -> bytes:
        try:
            return self._path(number).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StoreError(
                f"The answers in {self._path(number)} cannot be read ({error}).",
                why="A lost sample must be captured again from the tokens that were written first.",
                next="check that disk, then run the same command again.",
            ) from error

    def _append(self, number: int, data: bytes) -> None:
        path = self._path(number)
        if number not in self._whole:
            self._cut_off_torn_end(number)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._whole.discard(number)  # until the write succeeds
        try:
            write_whole(fd, data)
        finally:
            os.close(fd)
        self._whole.add(number)

    def _cut_off_torn_end(self, number: int) -> None:
        path = self._path(number)
        if not path.exists():
            make_folder(self._folder)
            path.touch(mode=0o600)
            sync_folder(self._folder)
        end = max((end for _, end in _whole_records(self._read(number))), default=0)
        os.truncate(path, end)
        self._whole.add(number)


def _record(answer: Answer) -> bytes:
    head = _HEAD.pack(answer.ordinal, answer.num_given, len(answer.token_ids))
    body = head + array("i", answer.token_ids).tobytes()
    return body + _digest(body)


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()


def _whole_records(data: bytes) -> Iterator[tuple[Answer, int]]:
    """Each whole record, and the offset of its end; damaged records are skipped."""
    at = 0
    while len(data) - at >= _HEAD.size:
        ordinal, num_given, num_tokens = _HEAD.unpack_from(data, at)
        body_end = at + _HEAD.size + 4 * num_tokens
        end = body_end + _DIGEST_BYTES
        if end <= len(data) and _digest(data[at:body_end]) == data[body_end:end]:
            tokens = array("i")
            tokens.frombytes(data[at + _HEAD.size : body_end])
            yield Answer(ordinal, num_given, tuple(tokens)), end
        at = end
