"""A proxy between a ledger and its server that breaks the connection at a chosen moment of a chosen call.

It reads requests and replies one at a time, so it knows which call is under way and whether the server has
made it: what the client learns is the test's to decide.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO


class Moment(StrEnum):
    """Where a call's connection breaks, or what becomes of the call."""

    BEFORE = "before the request is passed on"
    MIDWAY = "in the middle of the request"
    AFTER = "after the reply came, before it is passed back"
    TORN = "in the middle of the reply"
    SWALLOWED = "the request disappears, and nobody says so"
    UNHEARD = "the reply disappears, and nobody says so"
    LATE = "the request arrives long after its connection broke"
    TWICE = "the request arrives twice"


def nothing() -> None:
    """Does nothing else."""


class BrokenLink:
    """Passes calls on from connections to `path` to `target`, both Unix sockets. One client at a time."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self._target = path, target
        self._armed: tuple[str, Moment, Callable[[], None]] | None = None
        self._late: list[bytes] = []
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def url(self, reply_s: float) -> str:
        """For a client that waits at most so long for a reply."""
        return f"unix://{self.path}?socket_timeout={reply_s}"

    def strike(self, call: str, moment: Moment, then: Callable[[], None] = nothing) -> None:
        """Break the next call of this name, and do `then` at that moment."""
        self._armed = (call, moment, then)

    @property
    def is_armed(self) -> bool:
        return self._armed is not None

    def deliver(self) -> int:
        """Now the late requests arrive; returns how many."""
        late, self._late = self._late, []
        for request in late:
            self._ask_apart(request)
        return len(late)

    # -- one connection --------------------------------------------------------------------

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(near,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, near: socket.socket) -> None:
        far = socket.socket(socket.AF_UNIX)
        self._open |= {near, far}
        with near, far, suppress(OSError, EOFError):
            far.connect(str(self._target))
            with near.makefile("rb") as requests, far.makefile("rb") as replies:
                while self._pass_on(near, far, requests, replies):
                    pass
        self._open -= {near, far}

    def _pass_on(
        self, near: socket.socket, far: socket.socket, requests: BinaryIO, replies: BinaryIO
    ) -> bool:
        """One request and its reply; whether the connection is still whole."""
        request, words = resp_value(requests)
        moment, then = self._moment_of(name_of(words))
        if moment == Moment.LATE:
            self._late.append(request)
        if moment == Moment.MIDWAY:
            far.sendall(request[: len(request) // 2])
        if moment in (Moment.BEFORE, Moment.LATE, Moment.MIDWAY):
            then()
            return False
        if moment == Moment.SWALLOWED:
            then()
            requests.read()  # until the client hangs up
            return False
        far.sendall(request)
        reply, _ = resp_value(replies)
        if moment is not None:
            then()
        if moment == Moment.TWICE:
            self._ask_apart(request)
        if moment == Moment.UNHEARD:
            requests.read()
        if moment == Moment.TORN:
            near.sendall(reply[: len(reply) // 2])
        if moment in (Moment.AFTER, Moment.UNHEARD, Moment.TORN):
            return False
        near.sendall(reply)
        return True

    def _moment_of(self, name: str) -> tuple[Moment | None, Callable[[], None]]:
        if self._armed is None or self._armed[0] != name:
            return None, nothing
        (_, moment, then), self._armed = self._armed, None
        return moment, then

    def _ask_apart(self, request: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as far:
            far.connect(str(self._target))
            far.sendall(request)
            with far.makefile("rb") as replies:
                resp_value(replies)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()
        self.path.unlink()


def name_of(words: list[bytes]) -> str:
    """The ledger's operation or question that a command calls; another command's own name."""
    command = words[0].decode().upper()
    if command.startswith("EVAL"):
        return words[3 + int(words[2])].decode()
    return command


def resp_value(stream: BinaryIO) -> tuple[bytes, list[bytes]]:
    """The next value of the protocol, as its bytes and as the strings in it. Raises EOFError."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    kind, rest = line[:1], line[1:-2]
    if kind == b"$" and rest != b"-1":
        body = stream.read(int(rest) + 2)
        if len(body) < int(rest) + 2:
            raise EOFError
        return line + body, [body[:-2]]
    if kind == b"*":
        values = [resp_value(stream) for _ in range(int(rest))]
        return line + b"".join(raw for raw, _ in values), [word for _, words in values for word in words]
    return line, []
