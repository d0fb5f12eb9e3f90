"""vLLM's own HTTP: requests of token ids, answers of token ids, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Completion:
    """The written tokens, the last included, the path of the file of states, and each token's `logprobs`."""

    token_ids: tuple[int, ...]
    path: str
    logprobs: tuple[float, ...] = ()


class Client:
    def __init__(self, http: Http, *, timeout_s: float) -> None:
        self.http = http
        self._timeout_s = timeout_s

    # -- what the server is ----------------------------------------------------------------

    def version(self) -> str:
        """The server's own word; "unknown" if it has none."""
        status, body = self.http.exchange("GET", "/version", None, CONNECT_S)
        found = parsed(body) if status == 200 else {}
        return str(found.get("version", "unknown"))[:64] if isinstance(found, Mapping) else "unknown"

    def model(self) -> tuple[str, int | None]:
        """The served model's name, and the most tokens of a sequence. Raises EngineError, ConfigError."""
        status, body = self.http.exchange("GET", "/v1/models", None, CONNECT_S)
        if status in (401, 403):
            self.http.refuse_status(status, body)
        cards = parsed(body).get("data") if status == 200 and isinstance(parsed(body), Mapping) else None
        base = [card for card in cards or () if isinstance(card, Mapping) and not card.get("parent")]
        if not base or not isinstance(base[0].get("id"), str):
            raise EngineError(
                f"The server names no model ({status} {self.http.said(body)}).",
                why="A request names the model that is to answer it.",
                next="check that engine.url is the address of vLLM's OpenAI-compatible server.",
            )
        length = base[0].get("max_model_len")
        return base[0]["id"], length if isinstance(length, int) else None

    # -- what it writes --------------------------------------------------------------------

    def complete(self, model: str, wish: Wish, request_id: str) -> Completion:
        """The server names its file by `request_id`, with a word of its own before it.

        Raises NoAnswerError, TryAgainError, or EngineError for a request that the server refuses.
        """
        status, body = self.http.exchange(
            "POST", "/v1/completions", _request(model, wish), self._timeout_s, request_id=request_id
        )
        self.http.refuse_status(status, body)
        return _completion(parsed(body), wish)


def _request(model: str, wish: Wish) -> dict[str, Any]:
    """Every setting of sampling is named, or the server would take defaults from the model's folder.

    The answer ends with one of `wish.ends` alone: `ignore_eos` leaves out the end that the server's tokenizer
    names, which need not be among them.
    """
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
        "ignore_eos": True,
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
    if not are_ids(given) or not are_ids(written):
        raise _no_ids()
    if not isinstance(path, str):
        raise EngineError(
            "The server answered without hidden states.",
            why="A draft is trained on them. Nothing was captured.",
            next="start the server as `paceline engine vllm RUN.yaml` prints.",
        )
    refuse_other_tokens(given, written, wish)
    return Completion(tuple(written), path, tuple(float(x) for x in told if isinstance(x, int | float)))


def _no_ids() -> EngineError:
    return EngineError(
        "The server returned no token ids.",
        why="Text cannot be turned back into the very tokens that the states belong to.",
        next="use a vLLM that knows return_token_ids (0.18 or newer).",
    )
