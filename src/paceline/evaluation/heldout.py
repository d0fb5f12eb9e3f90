"""Prompts to measure on, as token ids; those that cannot be decoded are left out, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from paceline.data.prompts import Prompt
from paceline.errors import ConfigError, PacelineError
from paceline.evaluation.speculative import MAX_DRAFT_TOKENS
from paceline.evaluation.suites import SuitePrompt


@dataclass(frozen=True)
class Asked:
    """One prompt as the target reads it."""

    prompt_id: str
    token_ids: tuple[int, ...]
    category: str = ""


@dataclass(frozen=True)
class HeldOut:
    """`left_out`: the reason for each prompt that cannot be decoded, by prompt id. `repeated`: records that
    repeat an earlier one. `beyond`: prompts after the first evaluation.max_prompts.
    """

    asked: tuple[Asked, ...]
    left_out: Mapping[str, str]
    repeated: int = 0
    beyond: int = 0

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """The token ids of each."""
        return tuple(asked.token_ids for asked in self.asked)

    @property
    def note(self) -> str:
        """What is not measured, for people; empty if everything is."""
        told = []
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            count = f"{len(self.left_out)} of {len(self.left_out) + len(self.prompts)}"
            told.append(f"{count} held-out prompts are left out, the first: {name}: {reason}")
        if self.beyond:
            told.append(f"{self.beyond} held-out prompts are beyond evaluation.max_prompts")
        if self.repeated:
            told.append(f"{self.repeated} held-out prompts repeat an earlier one and are measured once")
        return "; ".join(told)


@dataclass(frozen=True)
class Room:
    """The limits on a prompt and its answer. `positions`: None if the target has no limit.

    `prompt_tokens`: of data.max_prompt_tokens; None for prompts that this setting does not bind.
    """

    vocab_size: int
    positions: int | None
    prompt_tokens: int | None
    answer_tokens: int


def encode_held_out(
    prompts: Iterable[SuitePrompt], encode: Callable[[Prompt], Sequence[int]], room: Room
) -> HeldOut:
    """Encode the prompts; broken ones, and those for which `encode` raises PacelineError, are left out."""
    usable, left_out = [], {}
    for asked in prompts:
        name, broken = asked.prompt.prompt_id, asked.prompt.broken
        try:
            ids = () if broken else tuple(encode(asked.prompt))
        except PacelineError as error:
            left_out[name] = error.what
            continue
        if reason := broken or _why_not(ids, room):
            left_out[name] = reason
        else:
            usable.append(Asked(name, ids, asked.category))
    return HeldOut(tuple(usable), left_out)


def _why_not(ids: Sequence[int], room: Room) -> str:
    foreign = next((token for token in ids if not 0 <= token < room.vocab_size), None)
    length = len(ids) + room.answer_tokens + MAX_DRAFT_TOKENS
    if not ids:
        return "it has no token"
    if foreign is not None:
        return f"it has the token {foreign}, and the target has {room.vocab_size} tokens"
    if room.prompt_tokens is not None and len(ids) > room.prompt_tokens:
        return f"it has {len(ids)} tokens, more than the {room.prompt_tokens} of data.max_prompt_tokens"
    if room.positions is not None and length > room.positions:
        return f"with its answer it takes {length} positions, and the target has {room.positions}"
    return ""


def refuse_nothing_to_measure(held_out: HeldOut) -> None:
    """Raise ConfigError if no prompt can be decoded."""
    if not held_out.asked:
        raise ConfigError(
            f"No held-out prompt can be decoded: {held_out.note}.",
            why="Without one there is nothing to measure the draft on; the trained draft is untouched.",
            next="change evaluation.prompts (or --suite) or evaluation.max_new_tokens, then run the same "
            "command again.",
        )
