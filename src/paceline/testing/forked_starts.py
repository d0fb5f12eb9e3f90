"""Many starts of one script for the price of one import of torch: every start is a fork.

The script imports what it needs, computes nothing, defines what a start does and ends with `serve(it)`.
A fork is a process of its own, which is killed, fails and ends as any other.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

ROOM_BYTES = 16 << 10  # that a server's forks have to say in /proc what they are


def serve(start: Callable[..., None]) -> None:
    """Fork for each list of arguments on standard input and tell the id; wait for each id, tell the code.

    A fork calls `start` and ends.
    """
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if isinstance(asked, list):
            answer = os.fork()
            if answer == 0:
                end_with(partial(start, *asked))
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def end_with(work: Callable[[], None]) -> NoReturn:
    """Do `work`, and end this process as its interpreter would, but leave the memory as it is.

    An interpreter that takes its modules apart touches all that a fork shares with its server, and so copies
    it: a third of a second of processor time for each fork.
    """
    code: Any = 0
    try:
        work()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 (as at the end of a script)
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        if not isinstance(code, int | None):
            sys.stderr.write(f"{code}\n")
            code = 1
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code or 0)


class ForkedStarts:
    """The server's process; a context, at whose end it ends. Threads may share it."""

    def __init__(self, script: str, *arguments: str) -> None:
        room = "-" * ROOM_BYTES
        self._one_at_a_time = threading.Lock()
        self._server = subprocess.Popen(
            [sys.executable, "-c", script, *arguments, room],
            env={**os.environ, "ROOM": room},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> ForkedStarts:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()  # it waits for a line and holds nothing
        self._server.communicate()

    def start(self, *arguments: str) -> int:
        """Start the script once, to its end; its exit code, or minus the signal that killed it."""
        return self.begin(*arguments).wait()

    def begin(self, *arguments: str) -> ForkedStart:
        return ForkedStart(self.ask, self.ask(arguments))

    def ask(self, what: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with self._one_at_a_time:
            self._server.stdin.write(json.dumps(what) + "\n")
            self._server.stdin.flush()
            return int(self._server.stdout.readline())


class ForkedStart:
    """What tests use of subprocess.Popen, for a process that somebody else has forked and waits for.

    `ask`: asks that process to wait for an id, and returns the exit code.
    """

    returncode: int | None = None

    def __init__(self, ask: Callable[[int], int], pid: int) -> None:
        self._ask, self.pid = ask, pid
        self._handle = os.pidfd_open(pid)
        self._is_asking = False

    def poll(self) -> int | None:
        return self.returncode if self._has_ended(0.0) else None

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if not self._has_ended(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def _has_ended(self, timeout: float | None) -> bool:
        """A signal's handler may ask, too, in the middle of this."""
        if self.returncode is None and not self._is_asking and self._is_over(timeout):
            self._is_asking = True
            self.returncode = self._ask(self.pid)
            os.close(self._handle)
        return self.returncode is not None

    def _is_over(self, timeout: float | None) -> bool:
        end = select.poll()  # select takes no large descriptor, and one object cannot poll twice at a time
        end.register(self._handle, select.POLLIN)
        return bool(end.poll(None if timeout is None else 1000 * timeout))

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)
