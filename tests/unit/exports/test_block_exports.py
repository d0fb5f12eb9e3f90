"""Exported block drafts: what the servers read, and the mistakes that they would not tell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports_case import ROPE, Case, case_of, target_folder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from paceline.errors import ConfigError
from paceline.exports.serving import Served, commands
from paceline.methods.table import METHODS

SIZES = {"block_size": 4, "layers": 2, "target_states": 3}
KNOBS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dspark": {"markov_rank": 6},
    "domino": {"gru_hidden_dim": 12, "emb_dim": 5},
    "dflash2": {"selector_rank": 6, "selector_top_k": 5, "conv_group_size": 8, "conv_kernel_size": 3},
}
LOADED = [(m, name) for m in KNOBS for name in ("vllm", "sglang", "hf") if (m, name) != ("domino", "vllm")]


def made(folder: Path, method: str, **knobs: Any) -> Case:
    section = METHODS.find(method).parse({**SIZES, **KNOBS[method], **knobs})
    return case_of(section.build(), target_folder(folder, ROPE))


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {method: made(tmp_path_factory.mktemp("target") / "model", method) for method in KNOBS}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change every part of the config alike: the top level and `dflash_config`."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    change(config["dflash_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("method", "name"), LOADED)
def test_what_is_exported_drafts_as_the_trainers_decoder(
    cases: dict[str, Case], method: str, name: str, tmp_path: Path
) -> None:
    """By the server's rules: an independent reader, from the folder alone and the target's tensors."""
    verdict = cases[method].check(name, cases[method].export(name, tmp_path / "draft"))
    assert verdict.problems == ()
    assert verdict.guesses >= 24
    assert verdict.error < 1e-5


@pytest.mark.parametrize("method", KNOBS)
def test_the_config_says_in_both_places_what_servers_look_for(
    cases: dict[str, Case], method: str, tmp_path: Path
) -> None:
    """vLLM and SGLang count layers from 0 here; no default of a loader is relied on."""
    config = json.loads((cases[method].export("hf", tmp_path / "draft") / "config.json").read_text())
    for part in (config, config["dflash_config"]):
        assert part["target_layer_ids"] == [1, 3, 5]
        assert (part["block_size"], part["mask_token_id"]) == (4, 60)
        assert part["sample_from_anchor"] is (method == "dspark")
    assert config["dflash_config"]["causal"] is False
    assert config["layer_types"] == ["full_attention"] * 2
    library = AutoConfig.from_pretrained(tmp_path / "draft")
    assert library.rope_parameters["rope_theta"] == 50000.0
    assert library.num_hidden_layers == 2


def set_to(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(part: dict[str, Any]) -> None:
        if key in part:
            part[key] = value

    return change


MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "layers one too low": set_to("target_layer_ids", [0, 2, 4]),
    "another block size": set_to("block_size", 3),
    "another mask token": set_to("mask_token_id", 5),
    "no rotary base": lambda part: [part.pop(key, None) for key in ("rope_theta", "rope_parameters")],
    "clamped positions": set_to("max_position_embeddings", 128),
    "a sliding window": set_to("layer_types", ["sliding_attention"] * 2),
    "another architecture": set_to("architectures", ["LlamaForCausalLM"]),
    "half a vocabulary": set_to("draft_vocab_size", 30),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(("method", "name"), LOADED)
def test_a_mistake_in_the_config_is_found(
    cases: dict[str, Case], method: str, name: str, mistake: str, tmp_path: Path
) -> None:
    """Servers draft on with most of them, and accept less."""
    folder = cases[method].export(name, tmp_path / "draft")
    edit(folder, MISTAKES[mistake])
    assert cases[method].check(name, folder).problems


def test_causal_blocks_are_for_vllm_alone(tmp_path: Path) -> None:
    """It reads the field; SGLang's places always see the whole block."""
    case = made(tmp_path / "model", "dflash", causal=True)
    folder = case.export("vllm", tmp_path / "draft")
    assert case.check("vllm", folder).problems == ()
    edit(folder, set_to("causal", False))
    assert case.check("vllm", folder).problems
    with pytest.raises(ConfigError, match="causal"):
        case.export("sglang", tmp_path / "other")


@pytest.mark.parametrize("method", KNOBS)
def test_a_missing_and_an_unknown_tensor_are_found(
    cases: dict[str, Case], method: str, tmp_path: Path
) -> None:
    """vLLM misses the first, SGLang the second."""
    name = next(name for known, name in LOADED if known == method)
    folder = cases[method].export(name, tmp_path / "draft")
    whole = load_file(folder / "model.safetensors")
    for dropped in whole:
        left = {key: tensor for key, tensor in whole.items() if key != dropped}
        save_file(left, folder / "model.safetensors")
        assert "is missing" in cases[method].check(name, folder).problems[0], dropped
    save_file({**whole, "extra": torch.zeros(1)}, folder / "model.safetensors")
    assert "no parameter takes extra" in cases[method].check(name, folder).problems[0]


def test_a_dspark_draft_without_a_confidence_head_says_so(tmp_path: Path) -> None:
    """SGLang takes a missing field for a head that is there."""
    case = made(tmp_path / "model", "dspark", confidence_weight=0.0, sample_from_anchor=False)
    folder = case.export("hf", tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    assert (config["enable_confidence_head"], config["sample_from_anchor"]) == (False, False)
    assert not [name for name in load_file(folder / "model.safetensors") if "confidence" in name]
    assert case.check("hf", folder).problems == ()


HEAD_MISTAKES: list[tuple[str, str, Any]] = [
    ("dspark", "sample_from_anchor", False),
    ("dspark", "markov_head_type", "gated"),
    ("dspark", "enable_confidence_head", False),
    ("domino", "projector_type", "dflash"),
    ("domino", "pure_draft_prefix_len", 0),
    ("domino", "shift_label", True),
    ("dflash2", "selector_top_k", 4),
    ("dflash2", "conv_group_size", 16),
    ("dflash2", "sample_from_anchor", True),
]


@pytest.mark.parametrize(("method", "key", "value"), HEAD_MISTAKES)
def test_a_mistake_about_the_head_is_found(
    cases: dict[str, Case], method: str, key: str, value: Any, tmp_path: Path
) -> None:
    """A server would leave the head out, or read it otherwise."""
    folder = cases[method].export("sglang", tmp_path / "draft")
    edit(folder, set_to(key, value))
    assert cases[method].check("sglang", folder).problems


def test_a_server_that_does_not_load_the_method_is_named(cases: dict[str, Case], tmp_path: Path) -> None:
    """With the methods that it does load."""
    with pytest.raises(ConfigError, match=r"'dflash' cannot be exported for speculators.*eagle3"):
        cases["dflash"].export("speculators", tmp_path / "draft")
    with pytest.raises(ConfigError, match=r"'domino' cannot be exported for vllm.*dspark"):
        cases["domino"].export("vllm", tmp_path / "draft")


def test_commands_ask_for_a_whole_block() -> None:
    """vLLM is told how many tokens to guess; SGLang reads the block's size from the config."""
    [vllm] = commands("vllm", Served("org/target", "draft", "dflash", 7)).values()
    assert json.loads(vllm[-1]) == {"model": "draft", "method": "dflash", "num_speculative_tokens": 7}
    [other] = commands("vllm", Served("org/target", "draft", "dflash2", 7)).values()
    assert json.loads(other[-1])["method"] == "dflash", "the architecture in the config says the rest"
    told = shlex.join(commands("sglang", Served("org/target", "draft", "dflash", 7))["sglang"])
    assert "--speculative-algorithm DFLASH" in told
    assert "num-steps" not in told
    assert list(commands("hf", Served("org/target", "draft", "domino", 7))) == ["sglang"], (
        "vLLM has no loader"
    )
