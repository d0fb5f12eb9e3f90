"""A run's held-out prompts, for the evaluator, which decodes them, and the producer, which says beforehand
what cannot be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.capture.prompt_file import PromptFile
from paceline.config.run import RunConfig
from paceline.evaluation.heldout import HeldOut, Room, encode_held_out, refuse_nothing_to_measure


def held_out_prompts(
    config: RunConfig, encode: Callable[[str], Sequence[int]], vocab_size: int, positions: int | None
) -> HeldOut:
    """As token ids, less what the target cannot decode."""
    file = PromptFile(config.evaluation.prompts)
    prompts = [prompt for prompt in file.read(0, file.size) if not prompt.broken]
    chosen = [(prompt.prompt_id, prompt.text) for prompt in prompts[: config.evaluation.max_prompts]]
    room = Room(vocab_size, positions, config.prompts.max_prompt_tokens, config.evaluation.max_new_tokens)
    return encode_held_out(chosen, encode, room)


def look_at_held_out(
    config: RunConfig,
    encode: Callable[[str], Sequence[int]],
    vocab_size: int,
    positions: int | None,
) -> str:
    """What a person should know of them before anything is captured.

    Raises ConfigError if none can be decoded and evaluation.unsupported is "refuse".
    """
    held_out = held_out_prompts(config, encode, vocab_size, positions)
    if config.evaluation.unsupported == "refuse":
        refuse_nothing_to_measure(held_out)
    return held_out.note
