"""SGLang's answers, as release 0.5.23 writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from paceline.engines.served.http import TryAgainError, Wish
from paceline.engines.sglang.wire import ServerInfo, answer, states_of
from paceline.errors import EngineError

WISH = Wish((11, 12, 13), 4, ends=(2,), logprobs=True)
# Two layers of two numbers: rows of the prompt, one of a batch that read other prompts too, one of its own.
ANSWER = """{
  "text": " of it", "output_ids": [21, 22, 2], "prompt_token_ids": [11, 12, 13],
  "meta_info": {
    "id": "paceline-0", "finish_reason": {"type": "stop", "matched": 2}, "prompt_tokens": 3,
    "weight_version": "default", "num_retractions": 0, "reasoning_tokens": 0, "completion_tokens": 3,
    "cached_tokens": 0, "e2e_latency": 0.11,
    "output_token_logprobs": [[-0.5, 21, null], [-0.25, 22, null], [-1.0, 2, null]],
    "hidden_states": [
      [[0.5, 1.0, -2.0, 3.0], [0.25, 1.0, 1.0, 1.0], [4.0, 1.0, 1.0, 1.0]],
      [[5.0, 1.0, 1.0, 1.0]],
      [6.0, 1.0, 1.0, -0.0078125]
    ]
  }
}"""
INFO: dict[str, Any] = {
    "version": "0.5.23",
    "disable_radix_cache": True,
    "chunked_prefill_size": -1,
    "context_length": None,
    "enable_return_aux_hidden_states": True,
    "return_aux_hidden_state_layer_ids": [1, 14, 26],
    "speculative_algorithm": None,
}


def test_an_answer_is_read_whole() -> None:
    """Tokens, log probabilities, and a row for every token but the last."""
    found = answer(json.loads(ANSWER), WISH)
    assert found.token_ids == (21, 22, 2)
    assert found.logprobs == (-0.5, -0.25, -1.0)
    states = states_of(found.states, (5, 2, 2), torch.bfloat16)
    assert states[:, 0, 0].tolist() == [0.5, 0.25, 4.0, 5.0, 6.0]
    assert states[4].tolist() == [[6.0, 1.0], [1.0, -0.0078125]]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt_token_ids": [11, 12, 14]}, EngineError),
        ({"prompt_token_ids": None}, TryAgainError),
        ({"output_ids": [21, 22]}, TryAgainError),
        ({"output_ids": [2, 21, 2]}, TryAgainError),
        ({"output_ids": [True, 22, 2]}, TryAgainError),
        ({"meta_info": None}, TryAgainError),
        ({"meta_info": {"finish_reason": None}}, TryAgainError),
        ({"meta_info": {"finish_reason": {"type": "abort", "message": "pool"}}}, TryAgainError),
    ],
)
def test_what_is_no_whole_answer_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    """Other tokens are an error; a cut-off or aborted answer may be whole the next time."""
    with pytest.raises(error):
        answer({**json.loads(ANSWER), **change}, WISH)
    with pytest.raises(TryAgainError):
        answer([], WISH)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (None, "shape"),
        ([], "shape"),
        ([[]], "not numbers"),
        ([[[1.0, 2.0], [1.0]]], "not numbers"),
        ([[["1", 2.0], [1.0, 2.0]]], "not numbers"),
        ([[[None, 2.0], [1.0, 2.0]]], "not numbers"),
        ([[[1.0, float("nan")], [1.0, 2.0]]], "not finite"),
        ([[[1.0, 2.0], [1.0, 0.1]]], "not of type bfloat16"),
        ([[[1.0, 2.0]]], "shape"),
        ("no rows", "not numbers"),
    ],
)
def test_states_of_another_form_are_refused(told: Any, reason: str) -> None:
    """Nothing is guessed, cut or rounded."""
    with pytest.raises(EngineError, match=reason):
        states_of(told, (2, 1, 2), torch.bfloat16)


def test_a_server_says_what_it_was_started_with() -> None:
    """Among some hundred fields; without the layers it captures its family's own choice."""
    assert ServerInfo.of(INFO) == ServerInfo("0.5.23", (1, 14, 26), False, 0, None)
    other = ServerInfo.of(INFO | {"return_aux_hidden_state_layer_ids": None, "chunked_prefill_size": 8192})
    assert (other.layer_ids, other.chunk_tokens) == (None, 8192)
    with pytest.raises(EngineError, match="does not describe itself"):
        ServerInfo.of({"version": "0.32.0"})
