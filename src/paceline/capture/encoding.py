"""Encodes prompts into the token ids that the target sees, or finds why a prompt cannot be captured.

A group's prompts are encoded when the group is captured. A prompt that cannot be encoded (no text, too long,
tokens that the target does not have) fails alone. A digest of the group's token ids is kept with every
sample: a template that writes the date, or another tokenizer, gives other token ids for the same text, and a
run must not hold two renderings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from paceline.data.prompts import Prompt
from paceline.data.source import PromptSource
from paceline.errors import ConfigError, EngineError

FITTING_IN_A_ROW = 64  # prompts; after so many, all with shorter texts are assumed to fit
NAMED = 3  # places that a message names
CHARACTERS_PER_TOKEN_MAX = 64  # longer texts are refused before the tokenizer spends minutes
# The errors that one input may cause in a tokenizer, a template or an engine.
INPUT_FAILURES = (EngineError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt of the run with its token ids; `broken`: why it has none.

    `answer_ids`: the answer written before, if the target is to prefill it instead of writing one.
    """

    ordinal: int
    task_id: str
    token_ids: tuple[int, ...]
    round: int = 0
    broken: str = ""
    answer_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptLimits:
    """`max_tokens` of a prompt, template included; None: no limit. `vocab_size` is the target's."""

    vocab_size: int
    max_tokens: int | None = None
    why: str = "data.max_prompt_tokens"

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
        why = f"the target's {max_positions} positions less {max_answer_tokens} for the answer"
        return PromptLimits(self.vocab_size, room, why)


class Encoding:
    """Encodes the prompts of a run. `encode`: text to token ids, through the target's chat template."""

    def __init__(self, encode: Callable[[str], Sequence[int]], limits: PromptLimits) -> None:
        self._encode = encode
        self._limits = limits
        self.num_encoded = 0

    def group(self, first: int, prompts: Iterable[Prompt]) -> list[EncodedPrompt]:
        """The prompts of one capture group, from ordinal `first` on."""
        return [self.prompt(ordinal, prompt) for ordinal, prompt in enumerate(prompts, start=first)]

    def prompt(self, ordinal: int, prompt: Prompt) -> EncodedPrompt:
        encoded = partial(EncodedPrompt, ordinal, prompt.prompt_id, round=prompt.round)
        if prompt.broken:
            return encoded((), broken=prompt.broken)
        try:
            ids = self._ids(prompt)
        except INPUT_FAILURES as error:
            broken = f"the prompt cannot be encoded: {type(error).__name__}: {error}"
        else:
            broken = self._refusal(ids)
        if not broken:
            return encoded(ids)
        return encoded((), broken=f"{prompt.place}: {broken}" if prompt.place else broken)

    def look_for_long(self, prompts: PromptSource) -> str:
        """A warning, before the first capture, about prompts that will fail for their length; "" if none.

        Encodes the prompts with the longest texts until several in a row fit, so it costs little.
        """
        limit, fitting = self._limits.max_tokens, 0
        if limit is None:
            return ""
        found: list[tuple[int, int, str]] = []  # ordinal, tokens, place
        for ordinal in prompts.longest:
            [prompt] = prompts.read(ordinal, 1)
            num_tokens = self._num_tokens(prompt)
            fitting = 0 if num_tokens > limit else fitting + 1
            if num_tokens > limit:
                found.append((ordinal, num_tokens, prompt.place or prompt.prompt_id))
            elif fitting == FITTING_IN_A_ROW:
                break
        if not found:
            return ""
        most = max(num_tokens for _, num_tokens, _ in found)
        return (
            f"{len(found)} prompts fail, longer than the {limit} tokens of {self._limits.why} (the "
            f"longest has {most}); the first: {'; '.join(place for _, _, place in sorted(found)[:NAMED])}"
        )

    def _num_tokens(self, prompt: Prompt) -> int:
        """The prompt's length, or a lower bound of it; 0 if it cannot be encoded."""
        if self._is_beyond_tokenizing(prompt):
            return len(prompt.text) // CHARACTERS_PER_TOKEN_MAX
        with suppress(*INPUT_FAILURES):
            return len(self._ids(prompt))
        return 0

    def _is_beyond_tokenizing(self, prompt: Prompt) -> bool:
        limit = self._limits.max_tokens
        return limit is not None and len(prompt.text) > limit * CHARACTERS_PER_TOKEN_MAX

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if self._is_beyond_tokenizing(prompt):
            limit = self._limits.max_tokens
            raise ValueError(f"its {len(prompt.text)} characters cannot be within {limit} tokens")
        self.num_encoded += 1
        return tuple(int(token) for token in self._encode(prompt.text))

    def _refusal(self, ids: tuple[int, ...]) -> str:
        limits = self._limits
        if not ids or not all(0 <= token < limits.vocab_size for token in ids):
            return f"{len(ids)} token ids, not all within the target's {limits.vocab_size}"
        if limits.max_tokens is not None and len(ids) > limits.max_tokens:
            return f"the prompt has {len(ids)} tokens, more than the {limits.max_tokens} of {limits.why}"
        return ""


def rendering_of(group: Iterable[EncodedPrompt]) -> str:
    """Digest of the token ids of a group; prompts without token ids are part of it."""
    digest = hashlib.sha256()
    for prompt in group:
        digest.update(json.dumps([prompt.ordinal, prompt.token_ids, bool(prompt.broken)]).encode())
    return digest.hexdigest()[:16]
