"""Many starts of one script for the price of one import of torch: every start is a fork.

The script imports what it needs, computes nothing, defines what a start does and ends with `serve(it)`.
A fork is a process of its own, which is killed, fails and ends as any other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable


def serve(start: Callable[..., None]) -> None:
    """Fork for each line of standard input, a list of arguments; answer with the exit code.

    A fork calls `start` and goes on to the end of the script, as the server does when its input ends.
    """
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            start(*json.loads(line))
            return
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


class ForkedStarts:
    """The server's process; a context, at whose end it ends."""

    def __init__(self, script: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> ForkedStarts:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()  # it waits for a line and holds nothing
        self._server.communicate()

    def start(self, *arguments: str) -> int:
        """Start the script once, to its end; its exit code, or minus the signal that killed it."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(arguments) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())
