"""About how long a run's samples are, from some of them and the target's tokenizer. No torch.

The chat template is not rendered here: its marks count as a few tokens a message. Exact lengths are what
`paceline data check RUN.yaml` shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from paceline.data.kept import KeptAnswers
from paceline.data.opening import Data
from paceline.data.prompts import Prompt
from paceline.data.settings import DataSection
from paceline.regular_files import read_regular
from paceline.target.chat import is_answer
from paceline.target.folder import JSON_BYTES_MAX

LOOKED_AT = 200  # samples, spread over the data
MARKS_OF_A_MESSAGE = 5  # tokens
CHARACTERS_PER_TOKEN = 4.0  # where there is no tokenizer
CHARACTERS_MAX = 50_000  # of a text that are encoded; the rest is taken to be alike
Count = Callable[[str], float]


@dataclass(frozen=True)
class Lengths:
    """Means over samples. `prompt`: tokens that are read; `answers`: tokens that are written, or learned.

    `answers_known`: whether the data's own answers tell how long answers are; else every one is taken to be
    as long as it may be. `tokenizer`: whether tokens were counted, not characters.
    """

    prompt: float
    answers: float
    answers_known: bool
    tokenizer: bool

    @property
    def sample(self) -> float:
        return self.prompt + self.answers


@dataclass(frozen=True)
class _Parts:
    prompt: float
    given: tuple[float, ...]  # the lengths of the data's own answers
    turns: int  # answers that the target writes


def mean_lengths(prompts: Data | KeptAnswers, data: DataSection, folder: Path) -> Lengths:
    """Raises ConfigError if the data cannot be read."""
    if isinstance(prompts, KeptAnswers):
        return _of_kept(prompts)
    tokenizer = _tokenizer(folder)
    count: Count = tokenizer or (lambda text: len(text) / CHARACTERS_PER_TOKEN)
    parts = [_parts(prompt, count) for prompt in _spread(prompts) if not prompt.broken]
    if not parts:
        return Lengths(1.0, float(data.max_answer_tokens), answers_known=False, tokenizer=False)
    given = [length for part in parts for length in part.given]
    known = bool(given)
    read = _mean([min(part.prompt, float(data.max_prompt_tokens)) for part in parts])
    if data.answers == "data":
        answers = _mean([sum(part.given) for part in parts])
    else:
        each = _mean([min(length, float(data.max_answer_tokens)) for length in given]) if known else None
        answers = _mean([part.turns for part in parts]) * (each or float(data.max_answer_tokens))
    answers = max(1.0, min(answers, data.max_prompt_tokens + data.max_answer_tokens - read))
    return Lengths(read, answers, answers_known=known, tokenizer=tokenizer is not None)


def _of_kept(prompts: KeptAnswers) -> Lengths:
    some = prompts.read(0, LOOKED_AT)
    answers = _mean([sum(stop - start for start, stop in prompt.spans) for prompt in some])
    whole = _mean(prompts.lengths)
    return Lengths(max(1.0, whole - answers), max(1.0, answers), answers_known=True, tokenizer=True)


def _spread(prompts: Data) -> Iterator[Prompt]:
    step = max(1, prompts.size // LOOKED_AT)
    for ordinal in range(0, prompts.size, step):
        yield from prompts.read(ordinal, 1)


def _parts(prompt: Prompt, count: Count) -> _Parts:
    if prompt.token_ids is not None:
        given = tuple(float(stop - start) for start, stop in prompt.spans)
        return _Parts(len(prompt.token_ids) - sum(given), given, 1)
    if prompt.chat is None:
        return _Parts(MARKS_OF_A_MESSAGE + count(prompt.text), (), 1)
    messages = prompt.chat.messages
    sizes = [(MARKS_OF_A_MESSAGE + count(_text(message)), is_answer(message)) for message in messages]
    given = tuple(size for size, answer in sizes if answer)
    return _Parts(sum(size for size, answer in sizes if not answer), given, max(1, len(given)))


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content, default=str) if content else ""


def _tokenizer(folder: Path) -> Count | None:
    """Counts the tokens of a text; None where the folder has no tokenizer.json that can be read."""
    found = _caught(lambda: Tokenizer.from_buffer(read_regular(folder / "tokenizer.json", JSON_BYTES_MAX)))
    if found is None:
        return None
    found.no_truncation()

    def count(text: str) -> float:
        part = text[:CHARACTERS_MAX]
        encoded = _caught(lambda: found.encode(part, add_special_tokens=False))
        if encoded is None:
            return len(text) / CHARACTERS_PER_TOKEN
        return len(encoded.ids) * len(text) / max(1, len(part))

    return count


def _caught(work: Callable[[], Any]) -> Any:
    """What it returns; None if the library fails, which may also panic: that is no Exception."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001
        return None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
