"""The section of the run file for vLLM, and the command that follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.engines.vllm.command import serve_command, served_layers
from paceline.engines.vllm.settings import VllmSection
from paceline.errors import ConfigError
from paceline.types import Feature, States, Tokens

FEATURES = (
    Feature("tokens", Tokens(), dtype="int32"),
    Feature("a", States((2, 15, 27)), dtype="bfloat16"),
)


def command(**knobs: Any) -> list[str]:
    section = VllmSection.parse({"managed": True, **knobs})
    layers = served_layers(FEATURES, 30)
    return serve_command(section, Path("/m"), "bfloat16", layers, 30, Path("/dev/shm/f"))


def after(name: str, words: list[str]) -> str:
    return words[words.index(name) + 1]


def test_the_command_asks_for_exactly_the_runs_states() -> None:
    """The method's layers and the last one, in vLLM's numbers; no cached prefix, no foreign defaults."""
    words = command(args=["--max-model-len", "2048"], devices=[2, 3])
    assert words[:3] == ["vllm", "serve", "/m"]
    speculative = json.loads(after("--speculative-config", words))
    assert speculative["method"] == "extract_hidden_states"
    ids = speculative["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
    assert ids == [2, 15, 27, 30]
    transfer = json.loads(after("--kv-transfer-config", words))
    assert transfer["kv_connector"] == "ExampleHiddenStatesConnector"
    assert "kv_connector_module_path" not in transfer
    assert transfer["kv_connector_extra_config"] == {"shared_storage_path": "/dev/shm/f"}
    assert after("--host", words) == "127.0.0.1"
    assert after("--dtype", words) == "bfloat16"
    assert after("--generation-config", words) == "vllm"
    assert after("--tensor-parallel-size", words) == "2"
    assert "--no-enable-prefix-caching" in words
    assert words[-2:] == ["--max-model-len", "2048"]
    replaced = json.loads(after("--kv-transfer-config", command(connector="mine.own:Connector")))
    assert (replaced["kv_connector"], replaced["kv_connector_module_path"]) == ("Connector", "mine.own")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({}, "give either url"),
        ({"url": "http://h:1", "managed": True}, "give either url"),
        ({"managed": True, "api_key_variable": "K"}, "has a key of its own"),
        ({"url": "ftp://h"}, "http://HOST:PORT"),
        ({"url": "http://user:word@h:1"}, "no password"),
        ({"url": "http://h:1/v1"}, "no path"),
        ({"managed": True, "args": ["--api-key", "x"]}, "--api-key is set by the run itself"),
        ({"managed": True, "args": ["--kv_transfer_config={}"]}, "--kv_transfer_config is set"),
        ({"managed": True, "args": ["--trust-remote"]}, "--trust-remote is set"),
        ({"managed": True, "args": ["--no-enable-prefix-cach"]}, "is set by the run itself"),
        ({"managed": True, "connector": "a b"}, "a connector is"),
        ({"managed": True, "program": []}, "program"),
    ],
)
def test_what_cannot_work_or_is_not_safe_is_refused(knobs: dict[str, Any], words: str) -> None:
    """Before anything is started; a key never stands in a run file."""
    with pytest.raises(ConfigError, match=words):
        VllmSection.parse(knobs)
