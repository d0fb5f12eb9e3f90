"""Which tokens of a chat are answers, by comparison of each answer with its own time. No torch.

An answer's own time is the chat before it, with a generation prompt, and the answer after that: as the
target has written it, or as the template renders the chat that ends with it. A token of the whole chat is an
answer's if the whole, from its beginning to this token, equals that earlier text. So a template that renders
earlier turns in another way (it drops their thoughts, moves the system prompt, ends them with another token)
makes them context from where they differ, and never targets that the target would not write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Ids = tuple[int, ...]
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Written:
    """An answer at its own time: all token ids up to its end. It begins at `start`."""

    ids: Ids
    start: int


@dataclass(frozen=True)
class EncodedChat:
    """Token ids up to the end of the last answer, and the answers as (start, stop)."""

    ids: Ids
    spans: Spans


def is_answer(message: Message) -> bool:
    """Whether the message is one that the draft learns; with weight 0 (as OpenAI has it) it is context."""
    return message.get("role") == "assistant" and message.get("weight") != 0


def exact_spans(answers: Iterable[Written], whole: Sequence[int]) -> Spans:
    """The answers' tokens in the `whole` chat."""
    found = ((answer.start, common(answer.ids, whole)) for answer in answers)
    return tuple((start, stop) for start, stop in found if stop > start)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shortest = min(len(one), len(other))
    return next((place for place in range(shortest) if one[place] != other[place]), shortest)
