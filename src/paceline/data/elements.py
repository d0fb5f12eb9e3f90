"""The elements of a file that is one JSON array, found without the whole array in memory.

Only strings and brackets are looked at here. Whether an element is JSON is for its reader to say, so a broken
one fails alone. (A library such as ijson gives values, of any size, and not where they begin.)
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from typing import BinaryIO

from paceline.data.packed import PIECE, RECORD_BYTES_MAX, RecordFile, too_long
from paceline.data.prompts import BrokenRecordError
from paceline.data.records import Record

_MARK = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(
    rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL
)  # up to its end, or to an escape that is cut
_SPACE = b" \t\r\n"


class Elements(RecordFile):
    unit = "element"
    kind = "JSON array"

    def read(self, offset: int = 0, number: int = 1) -> Iterator[Record]:
        """Raises ConfigError if the array does not end, or something follows it."""
        if offset == 0:
            with self.opened() as stream:
                offset = after_bracket(stream)
        with self.opened(offset) as stream:
            for place, content in _Scanner(stream, offset).elements():
                yield Record(number, place, content)
                number += 1


def after_bracket(stream: BinaryIO) -> int:
    """The place after the bracket that the content begins with; 0 if it begins with anything else."""
    start = stream.read(PIECE)
    content = start.removeprefix(codecs.BOM_UTF8).lstrip(_SPACE)
    return len(start) - len(content) + 1 if content.startswith(b"[") else 0


class _Scanner:
    """Finds the elements in a stream that stands within the array, at `offset` of the content."""

    def __init__(self, stream: BinaryIO, offset: int) -> None:
        self._stream = stream
        self._start = offset  # of the element, in the content
        self._held = b""
        self._begin = self._at = (
            0  # in what is held: of the element, or of what is left of it; and of the scan
        )
        self._dropped, self._digest = 0, hashlib.sha256()  # the beginning of an element that is too long

    def elements(self) -> Iterator[tuple[int, bytes | BrokenRecordError]]:
        """Each element's place and content. Raises OSError if the array is not whole."""
        depth = 0
        while True:
            mark = self._next_mark()
            if mark == b'"':
                self._pass_string()
            elif mark in b"[{":
                depth += 1
            elif depth:
                depth -= mark in b"]}"
            elif mark in b",]":
                is_last = mark == b"]"
                if not is_last or self._dropped or self._held[self._begin : self._at - 1].strip(_SPACE):
                    yield self._element()
                if is_last:
                    self._refuse_more()
                    return

    def _next_mark(self) -> bytes:
        while (found := _MARK.search(self._held, self._at)) is None:
            self._at = len(self._held)
            self._read_on()
        self._at = found.end()
        return found[0]

    def _pass_string(self) -> None:
        while True:
            found = _IN_STRING.match(self._held, self._at)
            self._at = found.end() if found else self._at
            if self._held[self._at : self._at + 1] == b'"':
                self._at += 1
                return
            self._read_on()

    def _element(self) -> tuple[int, bytes | BrokenRecordError]:
        """The element that ends before the mark at hand; the next one begins after it."""
        content, start = self._held[self._begin : self._at - 1], self._start
        size = self._dropped + len(content)
        self._begin, self._start = self._at, start + size + 1
        if size <= RECORD_BYTES_MAX:
            return start, content
        self._digest.update(content)
        digest = self._digest.hexdigest()
        self._dropped, self._digest = 0, hashlib.sha256()
        return start, too_long(size, RECORD_BYTES_MAX, digest)

    def _read_on(self) -> None:
        """Hold the next piece, too. Memory must hold an element, but not any element."""
        if self._at - self._begin > RECORD_BYTES_MAX:
            self._digest.update(self._held[self._begin : self._at])
            self._dropped += self._at - self._begin
            self._begin = self._at
        piece = self._stream.read(PIECE)
        if not piece:
            raise OSError("it ends within its JSON array")
        self._held = self._held[self._begin :] + piece
        self._at -= self._begin
        self._begin = 0

    def _refuse_more(self) -> None:
        rest = self._held[self._at :]
        while not rest.strip(_SPACE):
            if not (rest := self._stream.read(PIECE)):
                return
        raise OSError("something follows its JSON array")
