"""What is known of servers that do not draft for a target: by the first class that its folder names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.exports.drafted_targets import architectures_of, refusals


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("LlamaForCausalLM", {"vllm": 0, "speculators": 0, "sglang": 0}),
        ("GemmaForCausalLM", {"vllm": 1, "speculators": 1, "sglang": 2}),
        ("Gemma3ForCausalLM", {"vllm": 1, "speculators": 1, "sglang": 1}),
        ("GraniteForCausalLM", {"vllm": 0, "speculators": 0, "sglang": 1}),
        ("SmolLM3ForCausalLM", {"vllm": 0, "speculators": 0, "sglang": 1}),
    ],
)
def test_each_server_that_loads_the_format_and_refuses_the_class_is_one_sentence(
    name: str, told: dict[str, int]
) -> None:
    """vLLM builds what it does not know from the library's classes, which it drafts for; SGLang does not."""
    for format_name, count in told.items():
        found = refusals(format_name, "eagle3", (name, "OtherForCausalLM"))
        assert len(found) == count
        assert all(name in sentence for sentence in found)


def test_nothing_is_said_of_what_was_not_looked_up() -> None:
    """A folder without a class, a format of another package, and what SGLang asks of other methods."""
    assert refusals("vllm", "eagle3", ()) == refusals("other", "eagle3", ("GemmaForCausalLM",)) == []
    assert len(refusals("sglang", "other", ("GemmaForCausalLM",))) == 1  # vLLM loads that format, too


def test_the_classes_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """A server builds what the folder names, not the text decoder in it."""
    config = {"model_type": "x", "text_config": {"architectures": ["LlamaForCausalLM"]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["XForVision"]}))
    assert architectures_of(tmp_path) == ("XForVision",)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert architectures_of(tmp_path) == ()
