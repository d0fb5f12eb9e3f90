"""Encodes chats through the target's own template, and finds which of their tokens are answers.

A template that marks its assistant's text (`{% generation %}`) is believed; with any other, chat.py compares.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paceline.errors import EngineError
from paceline.target.channels import MARKS, channel_message
from paceline.target.chat import EncodedChat, Ids, Message, Written, common, exact_spans, is_answer
from paceline.target.folder import eos_token_ids, read_config, read_generation_config
from paceline.target.template import ChatTemplate, Rendered
from paceline.target.tokenizer import PromptEncoder


class ChatEncoder:
    """Chats of one target, as token ids. Messages are those of the OpenAI format (role, content, ...)."""

    def __init__(self, encoder: PromptEncoder, model_folder: Path) -> None:
        self._encoder = encoder
        self._tokenizer = encoder.tokenizer
        self._ends = frozenset(eos_token_ids(read_config(model_folder), read_generation_config(model_folder)))
        added = self._tokenizer.added_tokens_decoder
        self._specials = frozenset(number for number, token in added.items() if token.special)
        self._has_channels = {str(token) for token in added.values()} >= MARKS

    def prompt(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> Ids:
        """The chat so far, generation prompt included. Raises TemplateError."""
        return self._encoder.ids(self._template.render(messages, tools).text)

    def answered(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> EncodedChat:
        """The chat, whose last message is an answer.

        Raises TemplateError; EngineError if the last answer does not stand where the target would write it,
        or if the template marks answers and not this one.
        """
        if self._template.marks_answers:
            return self._as_marked(messages, tools)
        places = [place for place, message in enumerate(messages) if place and is_answer(message)]
        turns = [self._given(messages[: place + 1], tools) for place in places]
        ids = turns[-1].ids if turns else ()
        spans = exact_spans(turns, ids)
        if not spans or spans[-1][1] != len(ids):
            raise _no_target(
                "The template renders the last answer otherwise than it begins one.",
                "give the answer as the target writes it (its thoughts included)",
            )
        return EncodedChat(ids, spans)

    def message(self, answer: Sequence[int], prompt: Sequence[int]) -> dict[str, Any]:
        """The message that these tokens, written after `prompt`, stand for. Raises ValueError if for none."""
        ids = list(answer[:-1] if answer and answer[-1] in self._ends else answer)
        if getattr(self._tokenizer, "response_template", None) is not None:
            return {"role": "assistant", **self._tokenizer.parse_response(list(answer), prefix=list(prompt))}
        if self._has_channels:
            return channel_message(self._text(answer))
        return {"role": "assistant", "content": self._text(ids)}

    @property
    def _template(self) -> ChatTemplate:
        if self._encoder.template is None:
            raise EngineError(
                "The target has no chat template.",
                why="Only the template says how a chat of several messages is put into tokens.",
                next="add chat_template.jinja to the target's folder, or give plain prompts.",
            )
        return self._encoder.template

    def _given(self, messages: Sequence[Message], tools: Sequence[Message]) -> Written:
        """The last message, an answer, at its own time; without what the template adds after its end.

        It holds no answer (it begins at its end) if the template does not render it after its prompt.
        """
        prompt = self._template.render(messages[:-1], tools).text
        text = self._template.render(messages, tools, is_open=False).text
        prompt_ids, ids = self._encoder.ids(prompt), self._encoder.ids(text)
        start = common(prompt_ids, ids)
        if start < len(prompt_ids):
            start = (
                self._after_seam(ids, start, len(text) - len(prompt)) if text.startswith(prompt) else len(ids)
            )
        return Written(ids[: self._end(ids, start, len(ids))], start)

    def _after_seam(self, ids: Ids, place: int, characters: int) -> int:
        """The first token that holds none of the generation prompt, whose end the token at `place` holds.

        `characters`: the length of the text after the prompt. A tokenizer may merge across the seam.
        """
        ends = range(place + 1, len(ids))
        return next((start for start in ends if len(self._text(ids[start:])) <= characters), len(ids))

    def _as_marked(self, messages: Sequence[Message], tools: Sequence[Message]) -> EncodedChat:
        """The chat up to the end of the last answer, if the template marks it: never of an earlier one."""
        rendered = self._template.render(messages, tools, is_open=False)
        marked = _learnt(_joined(rendered.spans), messages)
        begin = _where_last_begins(rendered, self._template.render(messages[:-1], tools))
        encoded = self._tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = tuple(int(token) for token in encoded.input_ids)
        spans, has_last = [], False
        for first, last in marked:
            start, stop = _tokens_within(encoded.offset_mapping, first, last)
            if (stop := self._end(ids, start, stop)) > start:
                spans.append((start, stop))
                has_last = last > begin
        if not has_last:
            raise _no_target(
                "The template marks no token of the last answer ({% generation %}).",
                "correct the template's marks, or remove them all",
            )
        return EncodedChat(ids[: spans[-1][1]], tuple(spans))

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def _end(self, ids: Sequence[int], start: int, stop: int) -> int:
        """Where the answer within these tokens ends: after the first token that ends answers.

        Without one, after the last special token (a template's own end of a turn), or at `stop`.
        """
        ends = (place + 1 for place in range(start, stop) if ids[place] in self._ends)
        marks = (place + 1 for place in reversed(range(start, stop)) if ids[place] in self._specials)
        return next(ends, None) or next(marks, stop)


def _no_target(what: str, next: str) -> EngineError:
    return EngineError(
        what,
        why="No token of it is one that the target would write there.",
        next=f"{next}, or let the target write it (data.answers: target).",
    )


def _learnt(marked: list[tuple[int, int]], messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Of the marked answers those that are to be learnt. Raises EngineError if it cannot be told which."""
    answers = [message for message in messages if message.get("role") == "assistant"]
    if all(map(is_answer, answers)):
        return marked
    if len(marked) != len(answers):
        raise _no_target(
            f"The template marks {len(marked)} of {len(answers)} answers, some of which have weight 0.",
            "remove the weights",
        )
    return [span for span, answer in zip(marked, answers, strict=True) if is_answer(answer)]


def _where_last_begins(chat: Rendered, before: Rendered) -> int:
    """The character at which the marks of the last message can begin; the end of the text if it has none.

    `before`: the chat without that message, with a generation prompt. Where the template renders it otherwise
    then, the marks that the chat has more than before are the last message's.
    """
    if chat.text.startswith(before.text):
        return len(before.text)
    more = _joined(chat.spans)[len(_joined(before.spans)) :]
    return more[0][0] if more else len(chat.text)


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch, as one: a template may mark an answer in parts."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def _tokens_within(offsets: Sequence[tuple[int, int]], first: int, last: int) -> tuple[int, int]:
    """The tokens that lie wholly in the characters from `first` to `last`."""
    start = bisect_left(offsets, first, key=lambda offset: offset[0])
    stop = bisect_left(offsets, last + 1, key=lambda offset: offset[1])
    return start, max(start, stop)
