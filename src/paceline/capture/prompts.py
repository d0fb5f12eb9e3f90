"""Prompts from a JSONL file, in a fixed order, each with a stable id.

One object a line: {"id": ..., "prompt": ...}. The whole file is checked before anything starts,
so a broken line costs nothing but its message. A run answers the set `rounds` times; ordinal =
round * prompts + place in the file, and everything about a sample follows from its ordinal.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    prompt_id: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """Raises ConfigError naming file and line of the first line that is no prompt."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The prompt file {path} cannot be read ({error}).",
            next="set prompts.path to a JSONL file, such as prompts/train.jsonl.",
        ) from error
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompt = _parse(line, path, number)
            if prompt.prompt_id in prompts:
                raise _broken(path, number, f"the id {prompt.prompt_id!r} was used before")
            prompts[prompt.prompt_id] = prompt
    if not prompts:
        raise ConfigError(f"The prompt file {path} holds no prompt.", next="add lines, or set prompts.path.")
    return list(prompts.values())


def _parse(line: str, path: Path, number: int) -> Prompt:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise _broken(path, number, f"it is not JSON ({error})") from error
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("prompt"), str)
        or not record["prompt"].strip()
    ):
        raise _broken(path, number, 'it has no text under "prompt"')
    text = record["prompt"]
    prompt_id = record.get("id", hashlib.sha256(text.encode()).hexdigest()[:16])
    if not isinstance(prompt_id, str):
        raise _broken(path, number, '"id" is not a string')
    return Prompt(prompt_id, text)


def _broken(path: Path, number: int, what: str) -> ConfigError:
    return ConfigError(
        f"{path}, line {number}: {what}.",
        why="Leaving it out silently would change the run; nothing was started and nothing is lost.",
        next=f"mend or delete line {number} of {path} and run the same command again.",
    )


def prompts_digest(prompts: list[Prompt]) -> str:
    """Identity of the set and its order; a resumed run must have the same."""
    text = json.dumps([[p.prompt_id, p.text] for p in prompts])
    return hashlib.sha256(text.encode()).hexdigest()
