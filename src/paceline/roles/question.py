"""A question that a process of its own answers: what loads torch stays out of the command's process.

Question and answer are JSON, on standard input and output. What libraries print meanwhile goes to standard
error, which the command reads only if the process ends without an answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from paceline.errors import PacelineError, explained
from paceline.roles.child import RoleFailedError
from paceline.roles.plan import role_environment
from paceline.roles.process import SUPERVISOR_VARIABLE, die_with_supervisor
from paceline.terminal import one_line

SAID_MAX = 400  # characters of a process's last line


def ask(module: str, question: str, what: str, *, threads: int | None = None) -> str:
    """The answer of `python -m module`. `what`: the work, as a message calls it.

    Raises the error of that process.
    """
    count = len(os.sched_getaffinity(0)) if threads is None else threads
    ended = subprocess.run(
        [sys.executable, "-m", module],
        input=question,
        env={**os.environ, **role_environment(count), SUPERVISOR_VARIABLE: str(os.getpid())},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode == 0:
        return ended.stdout
    try:
        told: dict[str, Any] = json.loads(ended.stdout)
        raise RoleFailedError(told["what"], told["why"], told["next"], int(told["exit_code"]))
    except (ValueError, LookupError, TypeError):
        said = one_line(ended.stderr.strip().rpartition("\n")[2][:SAID_MAX])
        raise PacelineError(
            f"The {what} ended with {ended.returncode}: {said or 'it printed nothing'}.",
            why="Nothing was changed.",
            next="check that this Python has all that Paceline needs, and that there is enough memory.",
        ) from None


def answer(work: Callable[[str], str]) -> int:
    """Answer with `work`, in that process; returns its exit code."""
    die_with_supervisor()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        text, code = work(sys.stdin.read()), 0
    except Exception as error:  # noqa: BLE001 (every error is reported)
        told = explained(error)
        parts = {name: getattr(told, name) for name in ("what", "why", "next", "exit_code")}
        text, code = json.dumps(parts), told.exit_code
    output.write(text)
    output.close()
    return code
