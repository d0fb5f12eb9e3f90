"""A run's held-out prompts: the evaluator decodes them, the producer reports beforehand which it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.config.run import RunConfig
from paceline.data.opening import open_file
from paceline.evaluation.heldout import HeldOut, Room, encode_held_out, refuse_nothing_to_measure


def held_out_prompts(
    config: RunConfig, encode: Callable[[str], Sequence[int]], vocab_size: int, positions: int | None
) -> HeldOut:
    """The prompts as token ids, without those that the target cannot decode."""
    file = open_file(config.evaluation.prompts)
    prompts = [prompt for prompt in file.read(0, file.size) if not prompt.broken]
    chosen = [(prompt.prompt_id, prompt.text) for prompt in prompts[: config.evaluation.max_prompts]]
    room = Room(vocab_size, positions, config.data.max_prompt_tokens, config.evaluation.max_new_tokens)
    return encode_held_out(chosen, encode, room)


def look_at_held_out(
    config: RunConfig,
    encode: Callable[[str], Sequence[int]],
    vocab_size: int,
    positions: int | None,
) -> str:
    """What the user should know about the held-out prompts before the first capture.

    Raises ConfigError if none can be decoded and evaluation.unsupported is "refuse".
    """
    held_out = held_out_prompts(config, encode, vocab_size, positions)
    if config.evaluation.unsupported == "refuse":
        refuse_nothing_to_measure(held_out)
    return held_out.note
