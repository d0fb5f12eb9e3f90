"""The process of `paceline data export`: `python -m paceline.roles.answers_exporter RUN.yaml FILE`.

It writes a run's kept answers as JSON lines that a run can read: the token ids of each sample with the places
of its answers, and, where the target has written them, the chat that they stand for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from paceline.capture.encoding import places_to_write
from paceline.data.answers import Answer, AnswerFiles
from paceline.data.prompts import Chat, Prompt
from paceline.durable_files import replace_file
from paceline.errors import ConfigError
from paceline.ledger.facts import PROMPTS, RENDERING_DATE
from paceline.ledger.view import LedgerView
from paceline.roles.committed import committed_in
from paceline.roles.plan import RunPlan
from paceline.roles.process import run_role
from paceline.roles.target_binding import refuse_other_target
from paceline.target.chat_encoder import ChatEncoder
from paceline.target.tokenizer import PromptEncoder
from paceline.telemetry import EventLog


def export_answers(
    plan: RunPlan,
    events: EventLog,
    should_stop: Callable[[], bool],  # noqa: ARG001 (there is no safe point before the end)
    *,
    path: Path,
) -> None:
    """Write the file, whole or not at all. Raises ConfigError if the run has captured nothing."""
    config = plan.config
    view = config.view_ledger()
    refuse_other_target(view, config)
    encoder = PromptEncoder.of(config.target, date=view.facts().get(RENDERING_DATE))
    rows = list(answer_rows(plan, view, ChatEncoder(encoder, config.target.model)))
    if not rows:
        raise ConfigError(
            f"The run in {config.run.directory} keeps no answer of a committed sample.",
            why="It has captured nothing yet.",
            next=f"paceline produce, or paceline train, with the run file of {config.run.name}",
        )
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    events.write("answers_exported", samples=len(rows), path=str(path))


def answer_rows(plan: RunPlan, view: LedgerView, chats: ChatEncoder) -> Iterator[dict[str, Any]]:
    """One record a sample, in the order of the run.

    Raises ConfigError if a prompt is another one than the sample was captured from.
    """
    source = plan.source(view.facts()[PROMPTS]["stretches"])
    run = plan.config.run.directory
    for answer in AnswerFiles(run / "answers").all(committed_in(run)):
        [prompt] = source.read(answer.ordinal, 1) or [Prompt("")]
        if prompt.prompt_id != answer.task_id:
            raise ConfigError(
                f"Prompt {answer.ordinal} is {prompt.prompt_id!r} now, and its answer was written for "
                f"{answer.task_id!r}.",
                why="The prompts are not those that this run was started with.",
                next="put the run's sources back and run the same command again.",
            )
        row = {"id": answer.task_id, "token_ids": answer.token_ids, "spans": answer.spans}
        chat = _chat_of(prompt)
        if chat is not None and plan.config.data.answers == "target":
            row["messages"] = _answered(chat, answer, chats)
            row.update({"tools": chat.tools} if chat.tools else {})
        yield row


def _chat_of(prompt: Prompt) -> Chat | None:
    """The prompt as a chat; None if only its token ids are known."""
    if prompt.chat is not None or not prompt.text:
        return prompt.chat
    return Chat(({"role": "user", "content": prompt.text},))


def _answered(chat: Chat, answer: Answer, chats: ChatEncoder) -> list[Any]:
    """The chat with the answers that the target has written, up to the last one."""
    start, stop = answer.spans[-1]
    last = chats.message(answer.token_ids[start:stop], answer.token_ids[:start])
    messages, places = list(chat.messages), places_to_write(chat)
    written = [*(json.loads(turn) for turn in answer.turns), last]
    for place, message in zip(places, written, strict=False):
        messages[place : place + 1] = [message]
    return messages[: places[len(written) - 1] + 1]


if __name__ == "__main__":
    sys.exit(
        run_role(
            "answers_exporter",
            Path(sys.argv[1]),
            partial(export_answers, path=Path(sys.argv[2])),
            stops_itself=False,
        )
    )
