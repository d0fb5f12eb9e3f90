"""The section of the run file for SGLang, and the command that follows from it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from paceline.engines.sglang.command import sglang_command
from paceline.engines.sglang.settings import SglangSection
from paceline.errors import ConfigError
from paceline.target.facts import TargetFacts
from paceline.types import Feature, States, Tokens

TOKENS = Feature("tokens", Tokens(), dtype="int32")
FACTS = TargetFacts(64, 30, 100, "bfloat16", (2,), "model", "tokenizer")


def command(*layers: int, **knobs: Any) -> list[str]:
    section = SglangSection.parse({"url": "http://gpu:30000", **knobs})
    features = (TOKENS, Feature("states", States(layers), dtype="bfloat16"))
    return shlex.split(sglang_command(section, Path("/m"), FACTS, features))


def test_the_command_asks_for_exactly_the_runs_states() -> None:
    """In SGLang's numbers, without a draft, a cache or chunks; the plug-in adds the last one."""
    words = command(2, 15, 27, 30, directory="/dev/shm/a b")
    assert words[0] == "PACELINE_SGLANG_SINK=/dev/shm/a b"
    assert words[1:6] == ["python", "-m", "sglang.launch_server", "--model-path", "/m"]
    ids = words.index("--return-aux-hidden-state-layer-ids")
    assert words[ids + 1 : ids + 5] == ["1", "14", "26", "--disable-radix-cache"]
    assert words[words.index("--dtype") + 1] == "bfloat16"
    assert words[words.index("--host") + 1 :][:3] == ["gpu", "--port", "30000"]
    for flag in ("--enable-return-aux-hidden-states", "--disable-prefill-cuda-graph"):
        assert flag in words
    assert words[words.index("--chunked-prefill-size") + 1] == "-1"
    assert "--speculative-draft-model-path" not in words


def test_stock_answers_need_no_folder() -> None:
    """And no state after the last block."""
    words = command(2, 15, 27, api_key_variable="SGLANG_KEY")
    assert words[0] == "python"
    assert words[-2:] == ["--api-key", "$SGLANG_KEY"]
    with pytest.raises(ConfigError, match=r"state after the last block \(30\).*engine.directory"):
        command(2, 15, 27, 30)


def test_the_last_state_alone_still_names_a_layer() -> None:
    """Without one the server would capture its own choice."""
    assert command(30, directory="/s")[command(30, directory="/s").index("--disable-radix-cache") - 1] == "28"


def test_a_layer_that_sglang_cannot_name_is_refused() -> None:
    """The embedding's output has no number there."""
    with pytest.raises(ConfigError, match="cannot be named"):
        command(0, 15)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"url": None}, "url"),
        ({"url": "ftp://h"}, "http://HOST:PORT"),
        ({"url": "http://user:word@h:1"}, "no password"),
        ({"managed": True}, "managed"),
        ({"api_key_variable": "a key"}, "api_key_variable"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_impossible_settings_are_refused(knobs: dict[str, Any], words: str) -> None:
    """Before anything starts."""
    with pytest.raises(ConfigError, match=words):
        SglangSection.parse({"url": "http://h:1", **knobs})
