"""SGLang's own HTTP, `POST /generate` and `GET /server_info`: token ids in, token ids and states out.

With `--enable-return-aux-hidden-states` an answer holds, as lists of numbers, the states of the layers that
the server was started with: first those of the whole prompt, then a row for each written token but the last.
It holds no state after the last block; stock SGLang returns that one only alone, and normed. The plug-in
(sink.py) writes both to a file, and the answer then holds no states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.engines.served.http import (
    CONNECT_S,
    Http,
    TryAgainError,
    Wish,
    are_ids,
    parsed,
    refuse_other_tokens,
)
from paceline.errors import EngineError

ABORTED = "abort"
IN_FLIGHT = "Duplicate request ID"  # the same request is still being answered


@dataclass(frozen=True)
class Answer:
    """The written tokens, the last included, each one's `logprobs`, and the states as they were told."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    states: Any


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself. `layer_ids`: those that it captures, in SGLang's numbers."""

    version: str
    layer_ids: tuple[int, ...] | None
    caches_prefixes: bool
    chunk_tokens: int  # 0: prompts are read whole
    max_tokens: int | None  # of a sequence

    @classmethod
    def of(cls, told: Any) -> ServerInfo:
        """Raises EngineError for an answer that is not SGLang's."""
        if not isinstance(told, Mapping) or "disable_radix_cache" not in told:
            raise EngineError(
                "The server does not describe itself as SGLang does.",
                why="The states that it was started with must be those that the method needs.",
                next="check that engine.url is the address of SGLang's own server, release 0.5.23 or newer.",
            )
        layers, chunk = told.get("return_aux_hidden_state_layer_ids"), told.get("chunked_prefill_size")
        length = told.get("context_length")
        return cls(
            version=str(told.get("version", "unknown"))[:64],
            layer_ids=tuple(layers) if are_ids(layers) else None,
            caches_prefixes=not told["disable_radix_cache"],
            chunk_tokens=max(chunk, 0) if isinstance(chunk, int) else 0,
            max_tokens=length if isinstance(length, int) else None,
        )


class Client:
    def __init__(self, http: Http, *, timeout_s: float) -> None:
        self.http = http
        self._timeout_s = timeout_s

    def info(self) -> ServerInfo:
        status, body = self.http.exchange("GET", "/server_info", None, CONNECT_S)
        self.http.refuse_status(status, body)
        return ServerInfo.of(parsed(body))

    def generate(self, wish: Wish, request_id: str) -> Answer:
        """Raises NoAnswerError, TryAgainError, or EngineError for a request that the server refuses."""
        asked = json_request(wish, request_id)
        status, body = self.http.exchange("POST", "/generate", asked, self._timeout_s)
        if status == 400 and IN_FLIGHT in (said := self.http.said(body)):
            self.http.exchange("POST", "/abort_request", {"rid": request_id}, CONNECT_S)
            raise TryAgainError(said)
        self.http.refuse_status(status, body)
        return answer(parsed(body), wish)


def json_request(wish: Wish, request_id: str) -> dict[str, Any]:
    """Every setting of sampling is named, or the server would take defaults of its own."""
    return {
        "rid": request_id,
        "input_ids": list(wish.token_ids),
        "sampling_params": {
            "max_new_tokens": wish.max_tokens,
            "temperature": wish.temperature,
            "sampling_seed": wish.seed,
            "stop_token_ids": list(wish.ends),
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "n": 1,
            "ignore_eos": False,
        },
        "return_hidden_states": True,
        "return_prompt_token_ids": True,
        "return_logprob": wish.logprobs,
        "logprob_start_len": -1,
        "stream": False,
    }


def answer(told: Any, wish: Wish) -> Answer:
    """Raises TryAgainError for what is no whole answer, EngineError for what would be wrong again."""
    try:
        given, written, about = told["prompt_token_ids"], told["output_ids"], told["meta_info"]
        reason = about["finish_reason"]["type"]
        logprobs = [entry[0] for entry in about.get("output_token_logprobs") or ()]
        states = about.get("hidden_states")
    except (LookupError, TypeError, AttributeError) as error:
        raise TryAgainError(f"the answer is not one of SGLang's ({type(error).__name__})") from error
    if reason == ABORTED:
        raise TryAgainError("the server gave the request up")
    if not are_ids(given) or not are_ids(written):
        raise TryAgainError("the answer holds no token ids")
    refuse_other_tokens(given, written, wish)
    return Answer(tuple(written), tuple(float(x) for x in logprobs if isinstance(x, int | float)), states)


def states_of(told: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """The states in an answer, of `shape` [T, layers, H]: a list of rows for the prompt, then single rows.

    Raises EngineError unless they have that shape, and are numbers that `dtype` holds exactly.
    """
    rows: list[Any] = []
    try:
        for entry in told or ():
            rows.extend(entry if isinstance(entry[0], Sequence) else [entry])
        found = torch.tensor(rows, dtype=torch.float32)
    except (TypeError, ValueError, LookupError) as error:
        raise _no_states(f"states that are not numbers ({error})") from error
    if found.shape != (shape[0], shape[1] * shape[2]):
        raise _no_states(f"states of shape {list(found.shape)} instead of {[shape[0], shape[1] * shape[2]]}")
    if not bool(found.isfinite().all()):
        raise _no_states("states that are not finite")
    exact = found.to(dtype)
    if not torch.equal(exact.float(), found):
        raise _no_states(f"states that are not of type {str(dtype).removeprefix('torch.')}")
    return exact.view(shape)


def _no_states(found: str) -> EngineError:
    return EngineError(
        f"The server answered with {found}.",
        why="Tokens of its cache, and of all chunks of a prompt but the last, have no states; other layers "
        "or another type are not the run's. Nothing was captured.",
        next="start the server as `paceline engine sglang RUN.yaml` prints (--disable-radix-cache, "
        "--chunked-prefill-size -1, and the run's --dtype); if it was, try target.dtype: float32.",
    )
