"""Lets the target write the answers of chats anew, turn by turn, for all chats of a capture group together.

An answer becomes the message in its place, and the chat up to the next one is the prompt of the next turn.
The last turn is left to the capture itself. So a chat's sample follows from its group alone, as any other's.

An earlier answer is a target as far as its tokens stand in the sample as they were written: a template that
renders the history in another way (without its thoughts, say) makes it context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from paceline.capture.encoding import (
    INPUT_FAILURES,
    EncodedPrompt,
    PromptLimits,
    TooLongError,
    num_characters,
    places_to_write,
    refused,
)
from paceline.capture.settings import TooLong
from paceline.data.prompts import Chat
from paceline.target.chat import Ids, Written, exact_spans

if TYPE_CHECKING:
    from paceline.target.chat_encoder import ChatEncoder

# Asks the target for answers: prompts and the number of the turn in, each prompt's answer out.
Ask = Callable[[Sequence[EncodedPrompt], int], list[Ids]]


class TurnError(Exception):
    """Chats that cannot go on after what the target wrote. `reasons`: why, by task id."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons


@dataclass
class _Dialogue:
    """A chat that the target is writing: what is asked next, and the answers so far."""

    asked: EncodedPrompt
    chat: Chat
    messages: list[Any]
    places: list[int]
    written: list[Written] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """Whether the capture itself is not the next to write."""
        return not self.asked.is_whole and len(self.written) < len(self.places) - 1


class TurnWriter:
    def __init__(
        self, chats: Callable[[], ChatEncoder], limits: PromptLimits, ask: Ask, too_long: TooLong
    ) -> None:
        """`too_long`: a chat that outgrows the limits ends with the answer before, fails, or ends the run."""
        self._chats = chats
        self._limits = limits
        self._ask = ask
        self._too_long = too_long

    def write(self, prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
        """The same prompts; those of chats with all answers but the last.

        Raises TurnError, or ConfigError for a chat that must not be so long.
        """
        dialogues = {
            prompt.task_id: _Dialogue(prompt, chat, list(chat.messages), places_to_write(chat))
            for prompt in prompts
            if (chat := prompt.chat) is not None
        }
        turn = 0
        while open_ones := [dialogue for dialogue in dialogues.values() if dialogue.is_open]:
            answers = self._ask([dialogue.asked for dialogue in open_ones], turn)
            reasons = {}
            for dialogue, answer in zip(open_ones, answers, strict=True):
                try:
                    self._go_on(dialogue, answer)
                except TooLongError as error:
                    if self._too_long == "refuse":
                        raise refused(f"{dialogue.asked.task_id}: {error}") from error
                    reasons[dialogue.asked.task_id] = str(error)
                except INPUT_FAILURES as error:
                    reasons[dialogue.asked.task_id] = f"{type(error).__name__}: {error}"
            if reasons:
                raise TurnError(reasons)
            turn += 1
        return [
            dialogues[prompt.task_id].asked if prompt.task_id in dialogues else prompt for prompt in prompts
        ]

    def _go_on(self, dialogue: _Dialogue, answer: Ids) -> None:
        """Put the answer into the chat, and ask for the next one."""
        chats, asked, turn = self._chats(), dialogue.asked, len(dialogue.written)
        message = chats.message(answer, asked.token_ids)
        dialogue.written.append(Written(asked.token_ids + answer, len(asked.token_ids)))
        place = dialogue.places[turn]
        dialogue.messages[place : place + 1] = [message]
        turns = (*asked.turns, json.dumps(message, ensure_ascii=False))
        try:
            prompt = self._next_prompt(dialogue)
        except TooLongError:
            if self._too_long != "truncate":
                raise
            whole = dialogue.written[-1].ids
            spans = exact_spans(dialogue.written, whole)
            dialogue.asked = replace(asked, token_ids=whole, spans=spans, is_whole=True, chat=None)
        else:
            spans = exact_spans(dialogue.written, prompt)
            dialogue.asked = replace(asked, token_ids=prompt, spans=spans, turns=turns, chat=None)

    def _next_prompt(self, dialogue: _Dialogue) -> Ids:
        """The chat up to where the target writes next. Raises TooLongError."""
        turn, limits = len(dialogue.written), self._limits
        messages = dialogue.messages[: dialogue.places[turn]]
        found = f"{num_characters(messages)} characters, which cannot be within {limits.max_tokens} tokens"
        if limits.may_admit(num_characters(messages)):
            prompt = self._chats().prompt(messages, dialogue.chat.tools)
            if limits.admit(len(prompt)):
                return prompt
            found = f"{len(prompt)} tokens, more than the {limits.max_tokens} of {limits.why}"
        raise TooLongError(f"after {turn} answers the prompt has {found}")
