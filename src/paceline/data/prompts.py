"""A prompt of a run: a text, a chat or token ids; and the prompt that stands for a broken record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import Any

RESERVED = "unreadable-line-"  # prefix of the ids of broken records


@dataclass(frozen=True)
class Chat:
    """A conversation in the form that chat templates take: every message has a "role", most a "content"."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One prompt of a source. `broken`: why it can never be captured; `text` is then the record's content.

    `chat` or `token_ids`: given instead of a text. `spans`: the token ids that are answers, as (start, stop).
    `round`: 0 the first time that the run answers the prompt. For messages: `place`, where the prompt lies,
    `kind`, the format of its record, and `fault`, the kind of mistake of a broken one.
    """

    prompt_id: str
    text: str = ""
    broken: str = ""
    chat: Chat | None = None
    token_ids: tuple[int, ...] | None = None
    spans: tuple[tuple[int, int], ...] = ()
    round: int = 0
    place: str = field(default="", compare=False)
    kind: str = field(default="", compare=False)
    fault: str = field(default="", compare=False)


class BrokenRecordError(Exception):
    """The record holds no usable prompt. `kind`: what is wrong, without the particulars; `text`: its text."""

    def __init__(self, kind: str, particulars: str = "", text: str = "") -> None:
        super().__init__(f"{kind}{particulars}")
        self.kind, self.text = kind, text


def broken_prompt(number: int, place: str, fault: BrokenRecordError, text: str) -> Prompt:
    """A prompt for a broken record. Its id is made of the record's number, as its own may not be unique."""
    return Prompt(f"{RESERVED}{number}", text, f"{place}: {fault}", place=place, fault=fault.kind)


def content_of(prompt: Prompt) -> list[Any]:
    """What the prompt asks, as JSON values; two prompts with the same content are one."""
    chat = prompt.chat
    what = {"messages": chat.messages, "tools": chat.tools} if chat else prompt.text
    return [what, prompt.token_ids, *([prompt.spans] if prompt.spans else [])]


def length_of(prompt: Prompt) -> int:
    """About how many characters the prompt has; a token id counts as four."""
    if prompt.token_ids is not None:
        return 4 * len(prompt.token_ids)
    if prompt.chat is not None:
        return sum(len(str(message.get("content"))) for message in prompt.chat.messages)
    return len(prompt.text)


def asked(prompt: Prompt) -> list[tuple[str, str]]:
    """Every question of the prompt that gets an answer, as (key, words), the last one last.

    Questions with the same key are the same. A user's text in any turn is a question by itself; from the
    second turn on, so is all that the user has said up to there. Of token ids, those up to each answer are.
    """
    if prompt.token_ids is not None:
        ends = [start for start, _ in prompt.spans] or [len(prompt.token_ids)]
        words = f"the token ids of {prompt.prompt_id}"
        return [(_key("ids", repr(prompt.token_ids[:end])), words) for end in ends]
    if prompt.chat is None:
        return [(prompt.text, prompt.text)]
    texts = [str(message.get("content")) for message in prompt.chat.messages if message["role"] == "user"]
    keys = accumulate(texts, lambda earlier, text: _key("turns", earlier, text))
    return [*((text, text) for text in texts), *islice(zip(keys, texts, strict=True), 1, None)]


def _key(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def up_to_last_question(chat: Chat) -> Chat:
    """The chat up to the user's last turn; without messages if the user says nothing."""
    places = [place for place, message in enumerate(chat.messages, start=1) if message["role"] == "user"]
    return replace(chat, messages=chat.messages[: max(places, default=0)])
