"""A client of vLLM's HTTP server: requests of token ids, answers of token ids, and nothing else.

Every request has its own connection, a limit of time and of bytes, and ends when the run stops: a closed
connection makes the server drop the request. Redirects and proxies are not followed. The key is sent and
never told.
"""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from paceline.errors import ConfigError, EngineError, ServerUnavailableError

CONNECT_S = 10.0
STALL_S = 30.0  # between two pieces of one answer
LOOK_S = 0.25  # between two looks at whether the run stops
ANSWER_BYTES_MAX = 64 << 20
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


@dataclass(frozen=True)
class Completion:
    """The written tokens, the last included, the path of the file of states, and each token's `logprobs`."""

    token_ids: tuple[int, ...]
    path: str
    logprobs: tuple[float, ...] = ()


class Client:
    def __init__(
        self, url: str, key: str = "", *, timeout_s: float, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._parts = urlsplit(url)
        self._key = key
        self._timeout_s = timeout_s
        self._should_stop = should_stop

    # -- what the server is ----------------------------------------------------------------

    def check_health(self) -> None:
        """Raises NoAnswerError unless the server says that it can answer."""
        status, body = self._exchange("GET", "/health", None, CONNECT_S)
        if status != 200:
            raise NoAnswerError(f"its health is {status} {self._said(body)}")

    def version(self) -> str:
        """The server's own word; "unknown" if it has none."""
        status, body = self._exchange("GET", "/version", None, CONNECT_S)
        found = _json(body) if status == 200 else {}
        return str(found.get("version", "unknown"))[:64] if isinstance(found, Mapping) else "unknown"

    def model(self) -> tuple[str, int | None]:
        """The served model's name, and the most tokens of a sequence. Raises EngineError, ConfigError."""
        status, body = self._exchange("GET", "/v1/models", None, CONNECT_S)
        if status in (401, 403):
            raise _key_refused(bool(self._key))
        cards = _json(body).get("data") if status == 200 and isinstance(_json(body), Mapping) else None
        base = [card for card in cards or () if isinstance(card, Mapping) and not card.get("parent")]
        if not base or not isinstance(base[0].get("id"), str):
            raise EngineError(
                f"The server names no model ({status} {self._said(body)}).",
                why="A request names the model that is to answer it.",
                next="check that engine.url is the address of vLLM's OpenAI-compatible server.",
            )
        length = base[0].get("max_model_len")
        return base[0]["id"], length if isinstance(length, int) else None

    # -- what it writes --------------------------------------------------------------------

    def complete(self, model: str, wish: Wish) -> Completion:
        """Raises NoAnswerError, TryAgainError, or EngineError for a request that the server refuses."""
        status, body = self._exchange("POST", "/v1/completions", _request(model, wish), self._timeout_s)
        if status in (401, 403):
            raise _key_refused(bool(self._key))
        if status == 429 or status >= 500:
            raise TryAgainError(f"the server answered {status} {self._said(body)}")
        if status != 200:
            raise EngineError(
                f"The server refused a request of {len(wish.token_ids)} tokens: {status} {self._said(body)}",
                why="It would refuse it again.",
                next="act on the server's words; prompt and answer must fit into its --max-model-len.",
            )
        return _completion(_json(body), wish)

    # -- HTTP ------------------------------------------------------------------------------

    def _exchange(self, method: str, path: str, body: Any, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of the answer."""
        parts, deadline = self._parts, time.monotonic() + timeout_s
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_S)
        headers = {"Connection": "close", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            self._wait(connection, deadline, timeout_s)
            connection.sock.settimeout(STALL_S)
            response = connection.getresponse()
            data = response.read(ANSWER_BYTES_MAX)
        except (OSError, HTTPException, ValueError) as error:
            said = str(error) or type(error).__name__
            raise NoAnswerError(self._without_key(said), timed_out=isinstance(error, TimeoutError)) from error
        finally:
            connection.close()
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

    def _said(self, body: bytes) -> str:
        return self._without_key(" ".join(body[: 4 * SAID_MAX].decode(errors="replace").split())[:SAID_MAX])

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _request(model: str, wish: Wish) -> dict[str, Any]:
    """Every setting of sampling is named, or the server would take defaults from the model's folder."""
    return {
        "model": model,
        "prompt": list(wish.token_ids),
        "max_tokens": wish.max_tokens,
        "temperature": wish.temperature,
        "seed": wish.seed,
        "n": 1,
        "stream": False,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "ignore_eos": False,
        "stop_token_ids": list(wish.ends),
        "return_token_ids": True,
        **({"logprobs": 1} if wish.logprobs else {}),
        "kv_transfer_params": {"include_output_tokens": True} if wish.outputs else {},
    }


def _completion(found: Any, wish: Wish) -> Completion:
    """Raises TryAgainError for what is no whole answer, EngineError for one of another kind of server."""
    try:
        [choice] = found["choices"]
        given, written = choice["prompt_token_ids"], choice["token_ids"]
        transfer = found.get("kv_transfer_params") or {}
        told = (choice.get("logprobs") or {}).get("token_logprobs") or []
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise TryAgainError(f"the answer is not one of vLLM's ({type(error).__name__})") from error
    path = transfer.get("hidden_states_path") if isinstance(transfer, Mapping) else None
    if not _are_ids(given) or not _are_ids(written):
        raise _no_ids()
    if not isinstance(path, str):
        raise EngineError(
            "The server answered without hidden states.",
            why="A draft is trained on them. Nothing was captured.",
            next="start the server as `paceline engine vllm RUN.yaml` prints.",
        )
    if tuple(given) != wish.token_ids:
        raise EngineError(
            f"The server read other tokens than it was sent ({len(given)} instead of {len(wish.token_ids)}).",
            why="Its states would belong to another text. Nothing of it was captured.",
            next="check the server's version and its arguments (truncation, added tokens).",
        )
    if not _is_finished(written, wish):
        raise TryAgainError(f"the answer of {len(written)} tokens ends too early or too late")
    return Completion(tuple(written), path, tuple(float(x) for x in told if isinstance(x, int | float)))


def _is_finished(written: Sequence[int], wish: Wish) -> bool:
    """Whether the answer has as many tokens as it may have, or ends where the target ended it."""
    if not 1 <= len(written) <= wish.max_tokens or any(token in wish.ends for token in written[:-1]):
        return False
    return len(written) == wish.max_tokens or written[-1] in wish.ends


def _are_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and all(type(token) is int and token >= 0 for token in value)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return {}


def _no_ids() -> EngineError:
    return EngineError(
        "The server returned no token ids.",
        why="Text cannot be turned back into the very tokens that the states belong to.",
        next="use a vLLM that knows return_token_ids (0.18 or newer).",
    )


def _key_refused(has_key: bool) -> ConfigError:
    return ConfigError(
        "The server refuses the key." if has_key else "The server wants a key, and none was given.",
        why="It answers only who knows its key.",
        next="put the key into an environment variable and name it in engine.api_key_variable.",
    )


def stopped() -> ServerUnavailableError:
    return ServerUnavailableError(
        "The run was stopped while its server was working.",
        why="Nothing is lost: what was not committed is captured again.",
        next="run the same command again.",
    )
