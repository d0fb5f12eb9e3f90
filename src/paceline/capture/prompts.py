"""Prompts from a JSONL file, in a fixed order, each with a stable id.

One object a line: {"id": ..., "prompt": ...}. A run answers the set `rounds` times; ordinal =
round * prompts + place in the file, and everything about a sample follows from its ordinal.

The whole file is looked at before anything starts. What makes it another file refuses the run: it
cannot be opened, no line of it is a prompt, an id comes twice. A line that is no prompt by itself (not
UTF-8, not JSON, no text, text or id that UTF-8 cannot write) is set aside alone, with file and line as
its durable reason. It keeps its place, so the ordinals and ids of the others are those they always had.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError

UNREADABLE = "unreadable"  # payload key of a prompt that cannot be captured at all: the reason


@dataclass(frozen=True)
class Prompt:
    """`broken`: why the line cannot be used; `text` is then whatever stands there."""

    prompt_id: str
    text: str
    broken: str = ""

    @property
    def payload(self) -> dict[str, str]:
        """What the run's task carries."""
        return {UNREADABLE: self.broken} if self.broken else {"prompt": self.text}


class _BrokenError(Exception):
    """The line is no prompt; its id and text, as far as it has any."""

    def __init__(self, what: str, prompt_id: str = "", text: str = "") -> None:
        super().__init__(what)
        self.prompt_id, self.text = prompt_id, text


def read_prompts(path: Path) -> list[Prompt]:
    """Every line that is not blank, in order. Raises ConfigError if the file cannot be a run's prompts."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise ConfigError(
            f"The prompt file {path} cannot be read ({error}).",
            next="set prompts.path to a JSONL file, such as prompts/train.jsonl.",
        ) from error
    numbered = [(number, _prompt(line, path, number)) for number, line in enumerate(lines, start=1)]
    there = [(number, prompt) for number, prompt in numbered if prompt is not None]
    used = _ids_of_good_lines(there, path)
    if not used:
        raise ConfigError(
            f"The prompt file {path} holds no prompt.",
            why=f"No line of it is one; the first: {there[0][1].broken}." if there else "It is empty.",
            next='set prompts.path to a JSONL file with a text under "prompt" in each line.',
        )
    prompts = []
    for number, prompt in there:
        if prompt.broken:
            prompt = replace(prompt, prompt_id=_free_id(prompt.prompt_id, number, used))
            used.add(prompt.prompt_id)
        prompts.append(prompt)
    return prompts


def _prompt(line: bytes, path: Path, number: int) -> Prompt | None:
    as_it_stands = line.decode(errors="surrogateescape")
    if not as_it_stands.strip():
        return None
    try:
        return _parse(line)
    except _BrokenError as broken:
        return Prompt(
            broken.prompt_id, broken.text or as_it_stands, f"{path}, line {number}: {broken.args[0]}"
        )


def _parse(line: bytes) -> Prompt:
    try:
        record: Any = json.loads(line.decode().strip())
    except UnicodeDecodeError as error:
        raise _BrokenError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise _BrokenError(f"it is not JSON ({error})") from error
    record = record if isinstance(record, dict) else {}
    text, given = record.get("prompt"), record.get("id")
    known_id = given if isinstance(given, str) and _is_writable(given) else ""
    if not isinstance(text, str) or not text.strip():
        raise _BrokenError('it has no text under "prompt"', known_id)
    if not _is_writable(text):
        raise _BrokenError("its prompt cannot be encoded (half of a surrogate pair)", known_id, text)
    if "id" not in record:
        return Prompt(hashlib.sha256(text.encode()).hexdigest()[:16], text)
    if not isinstance(given, str):
        raise _BrokenError('"id" is not a string')
    if not _is_writable(given):
        raise _BrokenError('"id" cannot be encoded (half of a surrogate pair)')
    return Prompt(given, text)


def _is_writable(text: str) -> bool:
    """Whether UTF-8, and with it ledger and tokenizer, can write it; JSON can escape more than that."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ids_of_good_lines(prompts: list[tuple[int, Prompt]], path: Path) -> set[str]:
    first: dict[str, int] = {}
    for number, prompt in prompts:
        if prompt.broken:
            continue
        if prompt.prompt_id in first:
            raise ConfigError(
                f"{path}, line {number}: the id {prompt.prompt_id!r} was used before, in line "
                f"{first[prompt.prompt_id]}.",
                why="Samples are known by their ids (a prompt without one has that of its text); nothing was "
                "started and nothing is lost.",
                next=f"change or delete line {number} of {path} and run the same command again.",
            )
        first[prompt.prompt_id] = number
    return set(first)


def _free_id(wanted: str, number: int, used: Container[str]) -> str:
    """The broken line's own id if it has one that nobody else has, else one of its place."""
    if not wanted or wanted in used:
        wanted = f"line-{number}"
    while wanted in used:
        wanted += "-broken"
    return wanted


def prompts_digest(prompts: list[Prompt]) -> str:
    """Identity of the set and its order; a resumed run must have the same."""
    text = json.dumps([[p.prompt_id, p.text] for p in prompts])
    return hashlib.sha256(text.encode()).hexdigest()
