"""The gate before the server: it lets requests through while the server answers.

When a request got no answer, one thread waits for the server and checks it again; all others wait behind that
one, and send nothing meanwhile. The wait has a limit, after which the run ends without a loss.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from paceline.engines.served.http import NoAnswerError, TryAgainError, stopped
from paceline.errors import ServerUnavailableError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 2.0
TOLD_AFTER_S = 1.0


class Gate:
    def __init__(
        self,
        check: Callable[[float], None],
        *,
        where: str,
        patience_s: float,
        should_stop: Callable[[], bool],
        report: Callable[..., None],
    ) -> None:
        """`check` gets the seconds that the server has been silent. It raises NoAnswerError or TryAgainError
        while the server cannot answer, and any other error if it must not. `where`: its name for people."""
        self._check = check
        self._where = where
        self._patience_s = patience_s
        self._should_stop = should_stop
        self._report = report
        self._lock = threading.Lock()
        self._times = 0  # how often the server was found ready

    def enter(self) -> int:
        """Wait until the server is ready; returns a ticket for `wait`."""
        with self._lock:
            if not self._times:
                self._wait("the run begins")
            return self._times

    def wait(self, ticket: int, reason: str, failed: Callable[[], None] = lambda: None) -> None:
        """Wait until the server is found ready, unless it was since `ticket` was given.

        `failed` is called before that wait, by one thread at a time: the failure is that of the server as it
        is, and of none that came after it. Raises ServerUnavailableError after the patience, or when the run
        stops.
        """
        with self._lock:
            if self._times == ticket:
                failed()
                self._wait(reason)

    def _wait(self, reason: str) -> None:
        began, delay, told = time.monotonic(), FIRST_WAIT_S, False
        while True:
            waited = time.monotonic() - began
            if self._should_stop():
                raise stopped()
            try:
                self._check(waited)
                break
            except (NoAnswerError, TryAgainError) as error:
                reason = str(error)
            if not told and waited > TOLD_AFTER_S:
                told = True
                self._report("server", state="waiting", where=self._where, message=reason)
            if waited > self._patience_s:
                raise self._unavailable(reason)
            time.sleep(delay)
            delay = min(2 * delay, LONGEST_WAIT_S)
        self._times += 1
        if told:
            self._report("server", state="ready", where=self._where, seconds=round(waited, 1))

    def _unavailable(self, reason: str) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"The server at {self._where} has not answered for {self._patience_s:g} s (engine.patience_s): "
            f"{reason}.",
            why="Nothing is lost: no prompt failed, and everything committed is safe.",
            next="start the server (paceline engine NAME RUN.yaml prints the command), then run the same "
            "command again.",
        )
