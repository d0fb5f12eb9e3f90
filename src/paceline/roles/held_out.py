"""A run's held-out prompts: the evaluator decodes them, the producer reports beforehand which it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.config.run import RunConfig
from paceline.data.answers import AnswerFiles
from paceline.errors import ConfigError
from paceline.evaluation.heldout import HeldOut, Room, encode_held_out, refuse_nothing_to_measure
from paceline.evaluation.suites import HELD_OUT, Suite, read_suite


def held_out_prompts(
    config: RunConfig, encode: Callable[[str], Sequence[int]], vocab_size: int, positions: int | None
) -> HeldOut:
    """The prompts as token ids, without those that the target cannot decode."""
    section = config.evaluation
    chosen, _ = read_suite(Suite(HELD_OUT, section.prompts), section.max_prompts)
    room = Room(vocab_size, positions, config.data.max_prompt_tokens, section.max_new_tokens)
    return encode_held_out(chosen, lambda prompt: encode(prompt.text), room)


def look_at_held_out(
    config: RunConfig,
    encode: Callable[[str], Sequence[int]],
    vocab_size: int,
    positions: int | None,
) -> str:
    """What the user should know about the held-out prompts before the first capture.

    Raises ConfigError if none can be decoded and evaluation.unsupported is "refuse", or if one of them was
    answered by the run whose answers are trained on.
    """
    held_out = held_out_prompts(config, encode, vocab_size, positions)
    _refuse_shared_answers(config, held_out)
    if config.evaluation.unsupported == "refuse":
        refuse_nothing_to_measure(held_out)
    return held_out.note


def _refuse_shared_answers(config: RunConfig, held_out: HeldOut) -> None:
    """Kept answers are known by their tokens alone: a prompt ends where its first answer begins."""
    other, prompts = config.data.other_run, set(held_out.prompts)
    if other is None:
        return
    answers = AnswerFiles(other / "answers").all()
    shared = [answer.task_id for answer in answers if answer.token_ids[: answer.spans[0][0]] in prompts]
    if shared:
        raise ConfigError(
            f"{len(shared)} prompts of {config.evaluation.prompts} were answered by the run in {other}, "
            f"whose answers are trained on; the first is {shared[0]!r} there.",
            why="An acceptance length measured on training prompts means nothing.",
            next="choose other held-out prompts in evaluation.prompts.",
        )
