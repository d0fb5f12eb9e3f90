"""Encodes prompts into the token ids that the target sees, or finds why a prompt cannot be captured.

A group's prompts are encoded when the group is captured. A prompt that cannot be encoded (no text, too long,
tokens that the target does not have) fails alone. A digest of the group's token ids is kept with every
sample: a template that writes the date, or another tokenizer, gives other token ids for the same text, and a
run must not hold two renderings.

Answers that the target writes are no part of it: an encoded prompt ends where the target begins (of a chat,
with its first answer; turns.py writes the others). Given answers are: then the target writes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from paceline.capture.settings import CaptureSettings
from paceline.data.prompts import Chat, Prompt
from paceline.data.source import HasLengths, PromptSource
from paceline.engines.engine import TargetEngine
from paceline.errors import ConfigError, EngineError
from paceline.target.chat import Ids, Spans, is_answer

if TYPE_CHECKING:
    from paceline.target.chat_encoder import ChatEncoder

FITTING_IN_A_ROW = 64  # prompts; after so many, all with shorter texts are assumed to fit
NAMED = 3  # places that a message names
CHARACTERS_PER_TOKEN_MAX = 64  # longer texts are refused before the tokenizer spends minutes
# The errors that one input may cause in a tokenizer, a template or an engine.
INPUT_FAILURES = (EngineError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt of the run with its token ids; `broken`: why it has none.

    `spans`: which of them are answers, as (start, stop). `is_whole`: the target writes nothing and prefills
    them. `is_kept`: the run has written these answers before. `chat`: the ids are the beginning of a chat of
    which the target writes several answers. `turns`: its earlier answers, each a message in JSON.
    """

    ordinal: int
    task_id: str
    token_ids: Ids
    round: int = 0
    broken: str = ""
    spans: Spans = ()
    is_whole: bool = False
    is_kept: bool = False
    chat: Chat | None = None
    turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptLimits:
    """`max_tokens` of a prompt, template included; None: no limit. `vocab_size` is the target's."""

    vocab_size: int
    max_tokens: int | None = None
    why: str = "data.max_prompt_tokens"

    @classmethod
    def of(cls, engine: TargetEngine, settings: CaptureSettings) -> PromptLimits:
        """The limits of a run; given answers are within them."""
        facts, most, answer = engine.facts, settings.max_prompt_tokens, settings.max_answer_tokens
        if settings.answers == "target":
            return cls(facts.vocab_size, most).for_positions(facts.max_positions, answer)
        both = "data.max_prompt_tokens and data.max_answer_tokens together"
        whole = cls(facts.vocab_size, None if most is None else most + answer, both)
        return whole.for_positions(facts.max_positions, 0)

    def for_positions(self, max_positions: int | None, max_answer_tokens: int) -> PromptLimits:
        """These limits for a target with `max_positions`: prompt and answer must fit into them together."""
        if max_positions is None:
            return self
        room = max_positions - max_answer_tokens
        if room < 1:
            raise ConfigError(
                f"data.max_answer_tokens is {max_answer_tokens}, but the target has only {max_positions} "
                "positions for prompt and answer together.",
                why="Beyond its positions the target's states mean nothing.",
                next=f"set data.max_answer_tokens well below {max_positions}.",
            )
        if self.max_tokens is not None and self.max_tokens <= room:
            return self
        less = f" less {max_answer_tokens} for the answer" if max_answer_tokens else ""
        return PromptLimits(self.vocab_size, room, f"the target's {max_positions} positions{less}")

    def admit(self, num_tokens: int) -> bool:
        return self.max_tokens is None or num_tokens <= self.max_tokens

    def may_admit(self, num_characters: int) -> bool:
        """Whether a text is short enough to be given to the tokenizer."""
        return self.max_tokens is None or num_characters <= self.max_tokens * CHARACTERS_PER_TOKEN_MAX


class TooLongError(ValueError):
    """A sample has more tokens than its limits admit."""


class Encoding:
    """Encodes the prompts of a run for its engine's target, within its limits."""

    def __init__(self, engine: TargetEngine, settings: CaptureSettings) -> None:
        """Raises ConfigError if no prompt fits into the target's positions."""
        self._engine = engine
        self._settings = settings
        self.limits = PromptLimits.of(engine, settings)
        self.num_encoded = 0

    @cached_property
    def chats(self) -> ChatEncoder:
        return self._engine.chats

    def group(self, first: int, prompts: Iterable[Prompt]) -> list[EncodedPrompt]:
        """The prompts of one capture group, from ordinal `first` on.

        Raises ConfigError for one that is too long, if the run file says so.
        """
        return [self.prompt(ordinal, prompt) for ordinal, prompt in enumerate(prompts, start=first)]

    def prompt(self, ordinal: int, prompt: Prompt) -> EncodedPrompt:
        """Raises ConfigError as `group` does."""
        encoded = EncodedPrompt(ordinal, prompt.prompt_id, (), prompt.round, prompt.broken)
        if prompt.broken:
            return encoded
        try:
            return self._encoded(encoded, prompt)
        except TooLongError as error:
            if self._settings.too_long == "refuse":
                raise refused(f"{prompt.place or prompt.prompt_id}: {error}") from error
            broken = str(error)
        except _UnusableError as error:
            broken = str(error)
        except INPUT_FAILURES as error:
            broken = f"the prompt cannot be encoded: {type(error).__name__}: {error}"
        return replace(encoded, broken=f"{prompt.place}: {broken}" if prompt.place else broken)

    def look_for_long(self, prompts: PromptSource) -> str:
        """A warning, before the first capture, about prompts that will fail for their length; "" if none.

        Encodes the prompts with the longest texts until several in a row fit, so it costs little. The lengths
        of kept answers are known, and all are counted. Raises ConfigError instead, if the run file says so.
        """
        limit = self.limits.max_tokens
        if limit is None or (self._settings.answers == "data" and self._settings.too_long == "truncate"):
            return ""
        lengths = prompts.lengths if isinstance(prompts, HasLengths) else ()
        known = {ordinal: length for ordinal, length in enumerate(lengths) if length > limit}
        found = known or self._read_long(prompts, limit)
        if not found:
            return ""
        first = [prompt for ordinal in sorted(found)[:NAMED] for prompt in prompts.read(ordinal, 1)]
        many = f"{len(known)} of {len(lengths)} kept answers" if known else f"{len(found)} prompts"
        told = (
            f"longer than the {limit} tokens of {self.limits.why} (the longest has {max(found.values())}); "
            "the first: " + "; ".join(prompt.place or prompt.prompt_id for prompt in first)
        )
        if self._settings.too_long == "refuse":
            raise refused(f"{many} are {told}")
        return f"{many} fail, {told}"

    def _read_long(self, prompts: PromptSource, limit: int) -> dict[int, int]:
        """The tokens of each prompt above the limit, by ordinal."""
        found, fitting = {}, 0
        for ordinal in prompts.longest:
            num_tokens = self._num_tokens(*prompts.read(ordinal, 1))
            fitting = 0 if num_tokens > limit else fitting + 1
            if num_tokens > limit:
                found[ordinal] = num_tokens
            elif fitting == FITTING_IN_A_ROW:
                break
        return found

    def _num_tokens(self, prompt: Prompt) -> int:
        """The prompt's length, or a lower bound of it; 0 if it cannot be encoded."""
        with suppress(*INPUT_FAILURES):
            characters = self._num_characters(prompt)
            if not self.limits.may_admit(characters):
                return characters // CHARACTERS_PER_TOKEN_MAX
            return len(self._unlimited(EncodedPrompt(0, "", ()), prompt).token_ids)
        return 0

    def _encoded(self, encoded: EncodedPrompt, prompt: Prompt) -> EncodedPrompt:
        characters = self._num_characters(prompt)
        if not self.limits.may_admit(characters):
            raise TooLongError(
                f"its {characters} characters cannot be within {self.limits.max_tokens} tokens"
            )
        encoded = self._unlimited(encoded, prompt)
        ids, limits = encoded.token_ids, self.limits
        if not ids or not all(0 <= token < limits.vocab_size for token in ids):
            raise _UnusableError(f"{len(ids)} token ids, not all within the target's {limits.vocab_size}")
        if encoded.is_whole and len(ids) < 2:
            raise _UnusableError("it is a single token, and the target has to read one before")
        if limits.admit(len(ids)):
            return encoded
        if encoded.is_whole and self._settings.too_long == "truncate":
            return self._truncated(encoded, prompt)
        what = "sample" if encoded.is_whole else "prompt"
        raise TooLongError(
            f"the {what} has {len(ids)} tokens, more than the {limits.max_tokens} of {limits.why}"
        )

    def _unlimited(self, encoded: EncodedPrompt, prompt: Prompt) -> EncodedPrompt:
        """The prompt in token ids, however many."""
        self.num_encoded += 1
        if self._settings.answers == "target":
            return self._asked(encoded, prompt)
        if prompt.chat is not None and (answers := self._answers(prompt.chat)):
            return self._given(encoded, prompt.chat, answers[-1])
        if not prompt.spans:
            raise _UnusableError("it has no answer, and answers are to be those of the data")
        ids = (prompt.token_ids or ())[: prompt.spans[-1][1]]
        return replace(encoded, token_ids=ids, spans=prompt.spans, is_whole=True)

    def _asked(self, encoded: EncodedPrompt, prompt: Prompt) -> EncodedPrompt:
        """The prompt up to where the target writes for the first time."""
        if prompt.chat is not None:
            places = places_to_write(prompt.chat)
            ids = self.chats.prompt(prompt.chat.messages[: places[0]], prompt.chat.tools)
            return replace(encoded, token_ids=ids, chat=prompt.chat if len(places) > 1 else None)
        if prompt.token_ids is not None:
            ids = prompt.token_ids[: prompt.spans[-1][0] if prompt.spans else None]
            return replace(encoded, token_ids=ids)
        return replace(encoded, token_ids=tuple(int(token) for token in self._engine.encode(prompt.text)))

    def _given(self, encoded: EncodedPrompt, chat: Chat, last: int) -> EncodedPrompt:
        """The chat up to the answer at place `last`."""
        whole = self.chats.answered(chat.messages[: last + 1], chat.tools)
        return replace(encoded, token_ids=whole.ids, spans=whole.spans, is_whole=True)

    def _truncated(self, encoded: EncodedPrompt, prompt: Prompt) -> EncodedPrompt:
        """As many whole turns as fit; where not even the first answer does, as many of its tokens."""
        limit = self.limits.max_tokens
        assert limit is not None
        for last in reversed(self._answers(prompt.chat)[:-1] if prompt.chat else ()):
            encoded = self._given(encoded, prompt.chat, last) if prompt.chat else encoded
            if len(encoded.token_ids) <= limit:
                return encoded
        whole = [span for span in encoded.spans if span[1] <= limit]
        spans = whole or [(start, limit) for start, _ in encoded.spans if start < limit]
        if not spans:
            raise TooLongError(f"no answer begins within the {limit} tokens of {self.limits.why}")
        return replace(encoded, token_ids=encoded.token_ids[: spans[-1][1]], spans=tuple(spans))

    def _answers(self, chat: Chat) -> list[int]:
        """The places of the given answers; of a chat that may be truncated, those that could fit."""
        places = [n for n, message in enumerate(chat.messages) if n and is_answer(message)]
        if self.limits.max_tokens is None or self._settings.too_long != "truncate":
            return places
        fitting = [n for n in places if self.limits.may_admit(num_characters(chat.messages[: n + 1]))]
        return fitting or places[:1]

    def _num_characters(self, prompt: Prompt) -> int:
        """Of the text that the tokenizer would be given."""
        if prompt.chat is None:
            return len(prompt.text)
        messages = prompt.chat.messages
        if self._settings.answers == "target":
            return num_characters(messages[: places_to_write(prompt.chat)[0]])
        answers = self._answers(prompt.chat)
        return num_characters(messages[: answers[-1] + 1] if answers else messages)


class _UnusableError(ValueError):
    """Nothing can be captured of a prompt, for the reason it says."""


def places_to_write(chat: Chat) -> list[int]:
    """The places of the messages that the target writes; the last may lie one behind the chat.

    The first message is always given, and so are a call of a tool whose result follows, and an answer of
    weight 0. Raises ValueError if there is no place.
    """
    messages = chat.messages
    places = [
        place
        for place, message in enumerate(messages)
        if place and is_answer(message) and not _has_result(messages[place + 1 : place + 2])
    ]
    roles = [message.get("role") for message in messages]
    unanswered = takewhile(lambda role: role != "assistant", reversed(roles))
    if any(role in ("user", "tool") for role in unanswered):
        places.append(len(messages))
    if not places:
        raise _UnusableError("it is a chat in which no user and no tool says anything to answer")
    return places


def _has_result(following: Sequence[Mapping[str, Any]]) -> bool:
    return bool(following) and following[0].get("role") == "tool"


def num_characters(messages: Iterable[Mapping[str, Any]]) -> int:
    return sum(len(str(message.get("content") or "")) for message in messages)


def refused(what: str) -> ConfigError:
    """A sample is too long, and the run file says that this ends the run."""
    return ConfigError(
        f"{what}.",
        why="too_long is 'refuse'. Nothing more was captured.",
        next="raise max_prompt_tokens, shorten these, or set too_long to skip or truncate, in a new run if "
        "this one has captured something.",
    )


def rendering_of(group: Iterable[EncodedPrompt]) -> str:
    """Digest of the token ids of a group; prompts without token ids are part of it."""
    digest = hashlib.sha256()
    for prompt in group:
        whole = [prompt.ordinal, prompt.token_ids, bool(prompt.broken)]
        digest.update(json.dumps([*whole, prompt.spans] if prompt.spans else whole).encode())
    return digest.hexdigest()[:16]
