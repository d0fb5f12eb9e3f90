"""HTTP to an engine's server, the errors of both, and the wish that a request expresses.

Every request has its own connection, a limit of time and of bytes, and ends when the run stops: a closed
connection makes the server drop the request. Redirects and proxies are not followed. The key is sent and
never told.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from paceline.errors import ConfigError, EngineError, ServerUnavailableError

CONNECT_S = 10.0
STALL_S = 30.0  # between two pieces of one answer
LOOK_S = 0.25  # between two looks at whether the run stops
ANSWER_BYTES_MAX = 64 << 20
LATIN_1_MAX = 0xFF  # what a header can carry
SAID_MAX = 300  # characters of the server's own words in a message


class NoAnswerError(Exception):
    """The server cannot be reached, or gave no answer in time. `timed_out`: it had taken the request."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


class TryAgainError(Exception):
    """The server answered, and failed; the same request may succeed."""


@dataclass(frozen=True)
class Wish:
    """What the target is to write after `token_ids`, up to one of `ends`.

    `outputs`: the states of the written tokens, too; a server that does not know how leaves them out.
    """

    token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    ends: tuple[int, ...] = ()
    outputs: bool = True
    logprobs: bool = False


class Http:
    def __init__(self, url: str, key: str = "", *, should_stop: Callable[[], bool] = lambda: False) -> None:
        self._parts = urlsplit(url)
        self._key = key
        self._should_stop = should_stop

    def exchange(
        self,
        method: str,
        path: str,
        body: Any,
        timeout_s: float,
        bytes_max: int = ANSWER_BYTES_MAX,
        request_id: str = "",
    ) -> tuple[int, bytes]:
        """Status and body of the answer. Raises NoAnswerError, and EngineError for a longer one.

        `request_id`: how the server is to call the request.
        """
        parts, deadline = self._parts, time.monotonic() + timeout_s
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_S)
        headers = {"Connection": "close", "Content-Type": "application/json"}
        if request_id:
            headers["X-Request-Id"] = request_id
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            self._wait(connection, deadline, timeout_s)
            connection.sock.settimeout(STALL_S)
            response = connection.getresponse()
            data = response.read(bytes_max + 1)
        except ValueError as error:  # its words may quote a header, and the key stands in one
            raise NoAnswerError(f"the request cannot be sent ({type(error).__name__})") from None
        except (OSError, HTTPException) as error:
            said = str(error) or type(error).__name__
            raise NoAnswerError(self._without_key(said), timed_out=isinstance(error, TimeoutError)) from error
        finally:
            connection.close()
        if len(data) > bytes_max:
            raise EngineError(
                f"The server's answer has more than {bytes_max >> 20} MiB.",
                why="No answer that the run asks for is so long.",
                next="ask for shorter answers, or let the server write states to files.",
            )
        return response.status, data

    def _wait(self, connection: HTTPConnection, deadline: float, timeout_s: float) -> None:
        """Wait for the first byte of the answer. Raises TimeoutError; ServerUnavailableError at a stop."""
        answers = select.poll()
        answers.register(connection.sock, select.POLLIN)
        while not answers.poll(LOOK_S * 1000):
            if self._should_stop():
                raise stopped()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {timeout_s:g} s")

    def said(self, body: bytes) -> str:
        return self._without_key(" ".join(body[: 4 * SAID_MAX].decode(errors="replace").split())[:SAID_MAX])

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def check_health(self) -> None:
        """Raises NoAnswerError unless the server says that it can answer."""
        status, body = self.exchange("GET", "/health", None, CONNECT_S)
        if status != 200:
            raise NoAnswerError(f"its health is {status} {self.said(body)}")

    def refuse_status(self, status: int, body: bytes) -> None:
        """Raise TryAgainError, ConfigError or EngineError for an answer that is none."""
        if status in (401, 403):
            raise ConfigError(
                "The server refuses the key." if self._key else "The server wants a key, and none was given.",
                why="It answers only requests that carry its key.",
                next="put the key into an environment variable and name it in engine.api_key_variable.",
            )
        if status == 429 or status >= 500:
            raise TryAgainError(f"the server answered {status} {self.said(body)}")
        if status != 200:
            raise EngineError(
                f"The server refused a request: {status} {self.said(body)}",
                why="The server would refuse the same request again.",
                next="act on the server's words; prompt and answer must fit into the length that it serves.",
            )


def refuse_other_tokens(given: Sequence[int], written: Sequence[int], wish: Wish) -> None:
    """Raise EngineError if the server read other tokens than `wish`, TryAgainError for a cut-off answer."""
    if tuple(given) != wish.token_ids:
        raise EngineError(
            f"The server read other tokens than it was sent ({len(given)} instead of {len(wish.token_ids)}).",
            why="Its states would belong to another text. Nothing of it was captured.",
            next="check the server's version and its arguments (truncation, added tokens).",
        )
    if not _is_finished(written, wish):
        raise TryAgainError(f"the answer of {len(written)} tokens ends too early or too late")


def _is_finished(written: Sequence[int], wish: Wish) -> bool:
    """Whether the answer has as many tokens as it may have, or ends where the target ended it."""
    if not 1 <= len(written) <= wish.max_tokens or any(token in wish.ends for token in written[:-1]):
        return False
    return len(written) == wish.max_tokens or written[-1] in wish.ends


def are_ids(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, Sequence) and all(type(token) is int and token >= 0 for token in value)


def parsed(body: bytes) -> Any:
    """The JSON in an answer; {} if there is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return {}


def stopped() -> ServerUnavailableError:
    return ServerUnavailableError(
        "The run was stopped while its server was working.",
        why="Nothing is lost: what was not committed is captured again.",
        next="run the same command again.",
    )


def key_of(variable: str | None) -> str:
    """The key in that environment variable, without space around it. Raises ConfigError."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise ConfigError(
            f"There is no environment variable {variable}, which engine.api_key_variable names.",
            why="The server answers only requests that carry its key.",
            next=f"export {variable}=... and run the same command again.",
        )
    if not key.isprintable() or any(ord(character) > LATIN_1_MAX for character in key):
        raise ConfigError(
            f"The key in {variable} holds a character that no HTTP header can carry.",
            why="A key is one line of printable Latin-1 characters.",
            next=f"export {variable} again, with the key alone in it.",
        )
    return key
