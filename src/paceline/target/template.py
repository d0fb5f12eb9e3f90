"""Renders the chat template in a separate process that can be killed (template_worker.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from paceline.errors import EngineError
from paceline.target.template_worker import RENDER_S

WORKER = ["-m", "paceline.target.template_worker"]
TRIES = 3  # of a prompt whose worker ends
# The environment that the worker gets: no accelerator, no secrets, only the interpreter's own paths.
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_ALL")


class TemplateError(EngineError):
    """The template does not render this prompt."""


@dataclass(frozen=True)
class Rendered:
    """A chat as text. `spans`: the answers, as (start, stop) in characters, if the template marks them."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


class ChatTemplate:
    """`marks_answers`: the template says itself which of its text an assistant writes."""

    marks_answers = False

    def __init__(self) -> None:
        """Starts the worker process at once, so that it is ready when the tokenizer has loaded."""
        self._setting: dict[str, Any] = {}
        self._one_at_a_time = threading.Lock()  # groups in flight have a thread each
        self._process: subprocess.Popen[str] | None = _start()

    def use(
        self,
        template: str,
        special_tokens: Mapping[str, Any],
        *,
        date: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the template, once, before the first `render`.

        `date`: the date that the template sees. `variables`: further values that it may ask for.
        """
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._setting = {
            "template": template,
            "special_tokens": dict(special_tokens),
            "date": date,
            "variables": dict(variables or {}),
            "marks": self.marks_answers,
        }
        self._tell(self._setting)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        is_open: bool = True,
    ) -> Rendered:
        """The chat as text; `is_open`: with the beginning of an answer. Raises TemplateError."""
        chat = {"messages": list(messages), "tools": list(tools), "is_open": is_open}
        answer = self._ask(chat)
        if "error" in answer:
            raise _failed(answer["error"])
        return Rendered(answer["text"], tuple((start, stop) for start, stop in answer["spans"]))

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def __del__(self) -> None:
        self.close()

    def _ask(self, chat: Mapping[str, Any]) -> dict[str, Any]:
        """A worker that is killed from outside says nothing of the prompt: another one renders it."""
        with self._one_at_a_time:
            return self._ask_alone(chat)

    def _ask_alone(self, chat: Mapping[str, Any]) -> dict[str, Any]:
        for tries_left in reversed(range(TRIES)):
            if self._process is None:
                self._process = _start()
                self._tell(self._setting)
            process = self._process
            assert process.stdout is not None
            self._tell(chat)
            if line := process.stdout.readline():
                answer: dict[str, Any] = json.loads(line)
                return answer
            code = process.wait()
            self.close()
            if code == -signal.SIGPROF:
                raise _failed(f"it was stopped after {RENDER_S} s of processor time")
            if not tries_left:
                raise _failed(f"{TRIES} processes in a row ended with it, the last one with {code}")
        raise AssertionError("unreachable")

    def _tell(self, what: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the worker has ended; the next read reports it
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()


def _start() -> subprocess.Popen[str]:
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(
        [sys.executable, *WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def _failed(reason: str) -> TemplateError:
    return TemplateError(
        f"The target's chat template does not render: {reason}",
        why="Prompts must be encoded exactly as the target expects them.",
        next="correct the chat template of target.model (chat_template.jinja or tokenizer_config.json).",
    )
