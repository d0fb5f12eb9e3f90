"""Renders the chat template in a separate process that can be killed (template_worker.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from paceline.errors import EngineError
from paceline.target.template_worker import RENDER_S

WORKER = ["-m", "paceline.target.template_worker"]
TRIES = 3  # of a prompt whose worker ends
# The environment that the worker gets: no accelerator, no secrets, only the interpreter's own paths.
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_ALL")


class TemplateError(EngineError):
    """The template does not render this prompt."""


class ChatTemplate:
    def __init__(self) -> None:
        """Starts the worker process at once, so that it is ready when the tokenizer has loaded."""
        self._setting: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = _start()

    def use(self, template: str, special_tokens: Mapping[str, Any], date: str | None = None) -> None:
        """Set the template, once, before the first `render`. `date`: the date that the template sees."""
        self._setting = {"template": template, "special_tokens": dict(special_tokens), "date": date}
        self._tell(self._setting)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat as text, generation prompt included. Raises TemplateError."""
        answer = self._ask(messages)
        if "error" in answer:
            raise _failed(answer["error"])
        return str(answer["text"])

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

    def _ask(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """A worker that is killed from outside says nothing of the prompt: another one renders it."""
        for tries_left in reversed(range(TRIES)):
            if self._process is None:
                self._process = _start()
                self._tell(self._setting)
            process = self._process
            assert process.stdout is not None
            self._tell(messages)
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
