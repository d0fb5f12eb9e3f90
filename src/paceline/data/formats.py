"""The formats of a record, and the parser that makes a prompt of one.

A record is a JSON object or the row of a table. Its keys say its format. A record that fits several formats
is taken for the first of FORMATS that fits, because the earlier ones say more: token ids leave nothing open,
and a chat says more than its first question.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from paceline.data.chats import alpaca, openai, sharegpt
from paceline.data.prompts import RESERVED, BrokenRecordError, Chat, Prompt, content_of
from paceline.data.token_records import token_ids

ID_BYTES_MAX = 1024  # of an id written as JSON: file names, ledger rows and slot headers hold it
Record = Mapping[str, Any]


class Kind(NamedTuple):
    """`keys`: a record with one of them has this format."""

    keys: tuple[str, ...]
    parse: Callable[[Record], Prompt]


def _plain(record: Record) -> Prompt:
    text = record.get("prompt")
    if not isinstance(text, str):
        raise BrokenRecordError('it has no text under "prompt"')
    if not text.strip():
        raise BrokenRecordError("its prompt is empty")
    return Prompt("", text)


def _of_chat(read: Callable[[Record], Chat]) -> Callable[[Record], Prompt]:
    return lambda record: Prompt("", chat=read(record))


FORMATS: dict[str, Kind] = {
    "tokens": Kind(("prompt_ids", "token_ids", "input_ids"), token_ids),
    "messages": Kind(("messages",), _of_chat(openai)),
    "sharegpt": Kind(("conversations", "conversation"), _of_chat(sharegpt)),
    "alpaca": Kind(("instruction",), _of_chat(alpaca)),
    "prompts": Kind(("prompt",), _plain),
}
CHATS = ("messages", "sharegpt", "alpaca")
KEYS = frozenset(
    (
        *("id", "tools", "system", "history", "input", "output", "context", "response"),
        *("spans", "loss_mask", "assistant_masks", "labels"),
        *(key for kind in FORMATS.values() for key in kind.keys),
    )
)  # every key that is read


def parse_record(record: Record, format: str = "auto") -> Prompt:
    """The prompt of a record. Raises BrokenRecordError.

    `format`: one of FORMATS, or "auto". Without an id in the record, the prompt's id is a digest of it.
    """
    name = _format_of(record) if format == "auto" else format
    try:
        prompt = FORMATS[name].parse(record)
    except BrokenRecordError:
        if name == "prompts" and format == "prompts":
            _refuse_other_formats(record)
        raise
    content = _writable(content_of(prompt), "its prompt", prompt.text)
    if "id" in record:
        return replace(prompt, prompt_id=_id_of(record["id"]), kind=name)
    what = prompt.text if prompt.chat is None and prompt.token_ids is None else content
    return replace(prompt, prompt_id=hashlib.sha256(what.encode()).hexdigest()[:16], kind=name)


def _format_of(record: Record) -> str:
    found = next(
        (name for name, kind in FORMATS.items() if any(record.get(key) is not None for key in kind.keys)), ""
    )
    if not found:
        known = ", ".join(f'"{key}"' for kind in FORMATS.values() for key in kind.keys)
        raise BrokenRecordError("its format is unknown", f": it has none of the keys {known}")
    return found


def _refuse_other_formats(record: Record) -> None:
    chat = next((key for key in ("messages", "conversations", "conversation") if key in record), None)
    if chat:
        raise BrokenRecordError(
            "it holds a chat",
            f' ("{chat}"), not a prompt: name the file in a section `data` with format: auto',
        )


def _id_of(given: object) -> str:
    if type(given) is int or (isinstance(given, float) and math.isfinite(given)):
        given = json.dumps(given)
    if not isinstance(given, str):
        raise BrokenRecordError('its "id" is neither a string nor a number')
    _writable(given, 'its "id"')
    if (size := len(json.dumps(given))) > ID_BYTES_MAX:
        raise BrokenRecordError(
            'its "id" is too long', f": {size} bytes, more than the {ID_BYTES_MAX} that are stored"
        )
    if given.startswith(RESERVED):
        raise BrokenRecordError(f'its "id" begins with {RESERVED!r}, which is reserved for broken lines')
    return given


def _writable(value: object, what: str, text: str = "") -> str:
    """The value as JSON text. JSON escapes can hold what UTF-8 cannot encode; a table's cells, any type."""
    try:
        written = json.dumps(value, ensure_ascii=False)
        written.encode()
    except UnicodeEncodeError as error:
        raise BrokenRecordError(f"{what} cannot be encoded (half of a surrogate pair)", text=text) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BrokenRecordError(f"{what} holds what JSON cannot", f" ({error})") from error
    return written
