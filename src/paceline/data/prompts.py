"""A prompt, and the parser that reads one from a line of a prompt file.

A line is a JSON object: {"id": ..., "prompt": ...}. Without an id, the prompt's id is a digest of its text. A
broken line (not UTF-8, not JSON, no text, an id that no store can hold) becomes a prompt that fails, with the
reason: it keeps its place, so the other prompts keep their ordinals and ids.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ID_BYTES_MAX = 1024  # of an id written as JSON: file names, ledger rows and slot headers hold it
RESERVED = "unreadable-line-"  # prefix of the ids of broken lines
CHATS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Chat:
    """A conversation in the form that chat templates take: every message has a "role", most a "content"."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One prompt of a source. `broken`: why it can never be captured; `text` is then the line's content.

    `chat` or `token_ids`: given instead of a text. `spans`: the token ids that are answers, as (start, stop).
    `round`: 0 the first time that the run answers the prompt. `place`: where the prompt lies, for messages.
    """

    prompt_id: str
    text: str = ""
    broken: str = ""
    chat: Chat | None = None
    token_ids: tuple[int, ...] | None = None
    spans: tuple[tuple[int, int], ...] = ()
    round: int = 0
    place: str = field(default="", compare=False)


class _BrokenError(Exception):
    """The line holds no usable prompt. `text`: its text, if it has any."""

    def __init__(self, what: str, text: str = "") -> None:
        super().__init__(what)
        self.text = text


def parse_line(line: bytes, path: Path, number: int) -> Prompt | None:
    """The prompt of one line, broken or not; None if the line is blank."""
    as_it_stands = line.decode(errors="surrogateescape")
    if not as_it_stands.strip():
        return None
    try:
        return replace(_parse(line), place=_place(path, number))
    except _BrokenError as broken:
        return broken_line(path, number, broken.args[0], broken.text or as_it_stands)


def broken_line(path: Path, number: int, reason: str, text: str) -> Prompt:
    """A prompt for a broken line. Its id is made of the line number, as the line's own may not be unique."""
    return Prompt(f"{RESERVED}{number}", text, f"{_place(path, number)}: {reason}")


def _place(path: Path, number: int) -> str:
    return f"{path}, line {number}"


def _parse(line: bytes) -> Prompt:
    try:
        record: Any = json.loads(line.decode().strip())
    except UnicodeDecodeError as error:
        raise _BrokenError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise _BrokenError(f"it is not JSON ({error})") from error
    record = record if isinstance(record, dict) else {}
    text = record.get("prompt")
    if not isinstance(text, str):
        chat = next((key for key in CHATS if key in record), None)
        raise _BrokenError(
            f'it holds a chat ("{chat}"), not a prompt: write the user\'s text under "prompt"'
            if chat
            else 'it has no text under "prompt"'
        )
    if not text.strip():
        raise _BrokenError("its prompt is empty")
    if not _is_writable(text):
        raise _BrokenError("its prompt cannot be encoded (half of a surrogate pair)", text)
    return Prompt(_id_of(record, text), text)


def _id_of(record: dict[str, Any], text: str) -> str:
    if "id" not in record:
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    given = record["id"]
    if isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given):
        given = json.dumps(given)
    if not isinstance(given, str):
        raise _BrokenError('its "id" is neither a string nor a number')
    if not _is_writable(given):
        raise _BrokenError('its "id" cannot be encoded (half of a surrogate pair)')
    if (size := len(json.dumps(given))) > ID_BYTES_MAX:
        raise _BrokenError(f'its "id" takes {size} bytes, more than the {ID_BYTES_MAX} that are stored')
    if given.startswith(RESERVED):
        raise _BrokenError(f'its "id" begins with {RESERVED!r}, which is reserved for broken lines')
    return given


def _is_writable(text: str) -> bool:
    """Whether UTF-8 can encode the text; JSON escapes can hold more, such as half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
