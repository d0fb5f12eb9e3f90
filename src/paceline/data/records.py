"""Where records come from (lines or elements of a file, rows of a table), and how one becomes a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from paceline.data.formats import parse_record
from paceline.data.prompts import BrokenRecordError, Prompt, broken_prompt


@dataclass(frozen=True)
class Record:
    """`number`: of the line, element or row, from 1 on. `offset`: where a later read can begin.

    `content`: a line or element as bytes, a row as a mapping, or the reason why there is neither.
    """

    number: int
    offset: int
    content: bytes | Mapping[str, Any] | BrokenRecordError


class Records(Protocol):
    """Adapters: Lines (lines.py), Elements (elements.py), Parquet and HuggingFaceDataset (tables.py)."""

    @property
    def name(self) -> str:
        """Where the records lie, for messages."""

    @property
    def unit(self) -> str:
        """ "line", "element" or "row"."""

    @property
    def described(self) -> str:
        """What the source is taken for, such as "JSON lines, gzip"."""

    @property
    def is_stream(self) -> bool:
        """Whether a read reads all that lies before its offset, too."""

    def identity(self) -> list[Any]:
        """JSON values that change when the content changes. Raises ConfigError if it cannot be read."""

    def read(self, offset: int = 0, number: int = 1) -> Iterator[Record]:
        """The records from `offset` on, where record `number` begins. Raises ConfigError."""


@dataclass
class Source:
    """Records of one format ("auto": of any). `num_read`: records that were read, in all."""

    records: Records
    format: str = "auto"
    num_read: int = 0

    def read(self, offset: int = 0, number: int = 1) -> Iterator[tuple[Record, Prompt | None]]:
        """The records from `offset` on, each with its prompt, broken or not; None for a blank line."""
        for record in self.records.read(offset, number):
            self.num_read += 1
            yield record, _prompt_of(record, self.records, self.format)


def _prompt_of(record: Record, records: Records, format: str) -> Prompt | None:
    place, content = f"{records.name}, {records.unit} {record.number}", record.content
    if isinstance(content, BrokenRecordError):
        return broken_prompt(record.number, place, content, content.text)
    as_it_stands = _text(content)
    if not as_it_stands.strip():
        return None
    try:
        return replace(parse_record(_mapping(content, format), format), place=place)
    except BrokenRecordError as broken:
        return broken_prompt(record.number, place, broken, broken.text or as_it_stands)
    except RecursionError:
        deep = BrokenRecordError("it is nested too deeply")
        return broken_prompt(record.number, place, deep, as_it_stands)


def _text(content: bytes | Mapping[str, Any]) -> str:
    if isinstance(content, bytes):
        return content.decode(errors="surrogateescape")
    return json.dumps(content, default=str)


def _mapping(content: bytes | Mapping[str, Any], format: str) -> Mapping[str, Any]:
    if not isinstance(content, bytes):
        return content
    try:
        record: Any = json.loads(content.decode().strip())
    except UnicodeDecodeError as error:
        particulars = f" ({error.reason} at byte {error.start})"
        raise BrokenRecordError("it is not UTF-8", particulars) from error
    except (ValueError, RecursionError) as error:
        raise BrokenRecordError("it is not JSON", f" ({error})") from error
    if isinstance(record, dict):
        return record
    if format == "prompts":
        return {}  # its error names what is missing
    raise BrokenRecordError("it is not a JSON object")
