"""A run's held-out prompts: the evaluator decodes them, the producer reports beforehand which it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from paceline.config.run import RunConfig
from paceline.data.answers import AnswerFiles
from paceline.data.opening import open_held_out
from paceline.data.prompts import Prompt, up_to_last_question
from paceline.errors import ConfigError, EngineError
from paceline.evaluation.heldout import HeldOut, Room, encode_held_out, refuse_nothing_to_measure
from paceline.evaluation.suites import SuitePrompt
from paceline.roles.committed import committed_in
from paceline.target.chat_encoder import ChatEncoder
from paceline.target.tokenizer import PromptEncoder


class Encodes(Protocol):
    """What puts questions into the target's token ids: any engine, or `TemplateOnly`."""

    @property
    def chats(self) -> ChatEncoder: ...

    def encode(self, prompt: str) -> Sequence[int]: ...


class TemplateOnly:
    """The target's tokenizer and template without an engine."""

    def __init__(self, encoder: PromptEncoder, model_folder: Path) -> None:
        self._encoder, self._folder = encoder, model_folder
        self.encode = encoder.encode

    @cached_property
    def chats(self) -> ChatEncoder:
        return ChatEncoder(self._encoder, self._folder)


def held_out_prompts(config: RunConfig, target: Encodes, vocab_size: int, positions: int | None) -> HeldOut:
    """The questions as token ids, without those that the target cannot decode."""
    section = config.evaluation
    file = open_held_out(section.prompts)
    prompts = file.read(0, file.size)
    whole = [prompt for prompt in prompts if not prompt.broken]
    chosen = {prompt.prompt_id for prompt in whole[: section.max_prompts]}
    room = Room(vocab_size, positions, config.data.max_prompt_tokens, section.max_new_tokens)
    looked_at = (SuitePrompt(p) for p in prompts if p.broken or p.prompt_id in chosen)
    found = encode_held_out(looked_at, lambda prompt: question(prompt, target), room)
    return replace(found, repeated=file.index.repeated, beyond=len(whole) - len(chosen))


def question(prompt: Prompt, target: Encodes) -> Sequence[int]:
    """Token ids up to where the target answers last. Raises EngineError."""
    if prompt.token_ids is not None:
        return prompt.token_ids[: prompt.spans[-1][0] if prompt.spans else None]
    if prompt.chat is None:
        return target.encode(prompt.text)
    chat = up_to_last_question(prompt.chat)
    if not chat.messages:
        raise EngineError("it is a chat in which no user says anything")
    return target.chats.prompt(chat.messages, chat.tools)


def look_at_held_out(config: RunConfig, target: Encodes, vocab_size: int, positions: int | None) -> str:
    """What the user should know about the held-out prompts before the first capture.

    Raises ConfigError if none can be decoded and evaluation.unsupported is "refuse", or if one of them was
    answered by the run whose answers are trained on.
    """
    held_out = held_out_prompts(config, target, vocab_size, positions)
    _refuse_shared_answers(config, held_out)
    if config.evaluation.unsupported == "refuse":
        refuse_nothing_to_measure(held_out)
    return held_out.note


def _refuse_shared_answers(config: RunConfig, held_out: HeldOut) -> None:
    """Kept answers are known by their tokens alone: a question ends where an answer begins."""
    other, questions = config.data.other_run, set(held_out.prompts)
    if other is None:
        return
    shared = [
        answer.task_id
        for answer in AnswerFiles(other / "answers").all(committed_in(other))
        if any(answer.token_ids[:start] in questions for start, _ in answer.spans)
    ]
    if shared:
        raise ConfigError(
            f"{len(shared)} prompts of {config.evaluation.prompts} were answered by the run in {other}, "
            f"whose answers are trained on; the first is {shared[0]!r} there.",
            why="An acceptance length measured on training prompts means nothing.",
            next="choose other held-out prompts in evaluation.prompts.",
        )
