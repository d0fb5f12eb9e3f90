"""Held-out prompts as token ids; one that cannot be decoded is set aside with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.errors import PacelineError
from paceline.evaluation.speculative import MAX_DRAFT_TOKENS
from paceline.target.tokenizer import PromptEncoder


@dataclass(frozen=True)
class HeldOut:
    """`set_aside`: why, by prompt id."""

    prompts: tuple[tuple[int, ...], ...]
    set_aside: Mapping[str, str]

    @property
    def note(self) -> str:
        """One sentence for people; empty if every prompt can be decoded."""
        if not self.set_aside:
            return ""
        name, reason = next(iter(self.set_aside.items()))
        total = len(self.set_aside) + len(self.prompts)
        return f"{len(self.set_aside)} of {total} held-out prompts are set aside, the first: {name}: {reason}"


def encode_held_out(
    prompts: Sequence[tuple[str, str]],
    encoder: PromptEncoder,
    *,
    vocab_size: int,
    positions: int | None,
    new: int,
) -> HeldOut:
    """Of (id, text) pairs. `positions`: how many the target has; `new`: the most tokens of an answer."""
    usable, set_aside = [], {}
    for name, text in prompts:
        try:
            ids = encoder.encode(text)
        except PacelineError as error:
            set_aside[name] = error.what
            continue
        foreign = next((token for token in ids if not 0 <= token < vocab_size), None)
        length = len(ids) + new + MAX_DRAFT_TOKENS
        if foreign is not None:
            set_aside[name] = f"it has the token {foreign}, and the target has {vocab_size} tokens"
        elif positions is not None and length > positions:
            set_aside[name] = f"with its answer it takes {length} positions, and the target has {positions}"
        elif not ids:
            set_aside[name] = "it has no token"
        else:
            usable.append(ids)
    return HeldOut(tuple(usable), set_aside)
