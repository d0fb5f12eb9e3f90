"""The self-check finds every mistake that a server would not tell, and none in what is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports_case import (
    LINEAR,
    LLAMA3,
    OTHER_SCALES,
    TWO_SCALES,
    UNTRUNCATED,
    YARN,
    Case,
    make_case,
    target_folder,
)
from safetensors.torch import load_file, save_file

from paceline.errors import ConfigError
from paceline.exports.table import EXPORTS
from paceline.methods.eagle3.method import Eagle3Method
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import captured_sample, tiny_target

FORMATS = EXPORTS.names()
Tensors = dict[str, torch.Tensor]
IDS = "eagle_aux_hidden_state_layer_ids"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_exported_drafts_as_the_trainers_decoder(case: Case, name: str, tmp_path: Path) -> None:
    """By every server's rules the guesses are equal and the logits differ by rounding only."""
    verdict = case.check(name, case.export(name, tmp_path / "draft"))
    assert verdict.problems == ()
    assert verdict.guesses >= 24
    assert verdict.error < 1e-5


ROPES = {
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn of gpt-oss": UNTRUNCATED,
    "yarn of DeepSeek-V3": TWO_SCALES,
    "yarn with two unequal scales": OTHER_SCALES,
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_a_scaled_rotary_embedding_is_the_targets(rope: dict[str, Any], tmp_path: Path) -> None:
    """The draft is trained with the target's scaling, and a server reads the same from either form."""
    case = make_case(tmp_path / "model", rope)
    folder = case.export("vllm", tmp_path / "draft")
    assert case.check("vllm", folder).problems == ()
    edit_config(folder, lambda config: config.pop("rope_parameters"))
    assert case.check("vllm", folder).problems == ()
    edit_config(folder, lambda config: config.update(rope_scaling=None))
    assert case.check("vllm", folder).problems


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR], ids=lambda rope: rope["rope_type"])
def test_a_draft_takes_over_what_its_scaling_reads(rope: dict[str, Any], tmp_path: Path) -> None:
    """Of a target that turns a part of each head, or has entries of its own, only the scaling is taken."""
    own = {"partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1}
    head = TargetHead.load(target_folder(tmp_path / "model", {**rope, **own}))
    method = Eagle3Method({"draft_vocab_size": 48, "init": "random"})
    method.check_target(head)
    draft = method.build(head, [captured_sample(tiny_target(), 20, 4, seed=1)], seed=3)
    plain = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert method.describe(draft)["rope_scaling"] == plain


@pytest.mark.parametrize("change", [{"factor": None}, {"factor": 0.0}, {"factor": "four"}])
def test_a_scaling_without_frequencies_is_refused_at_the_start(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """By check_target, before anything is captured or trained."""
    head = TargetHead.load(target_folder(tmp_path / "model", {**LINEAR, **change}))
    with pytest.raises(ConfigError, match="rotary embedding"):
        Eagle3Method({"draft_vocab_size": 48}).check_target(head)


def test_a_whole_vocabulary_has_no_maps(tmp_path: Path) -> None:
    """A map that maps nothing would be a tensor that no parameter takes."""
    case = make_case(tmp_path / "model", vocab=61)
    folder = case.export("vllm", tmp_path / "draft")
    assert not {"d2t", "t2d"} & load_file(folder / "model.safetensors").keys()
    assert case.check("vllm", folder).problems == ()


def norm_before_residual(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(norm_before_residual=True))


def ids_one_too_low(folder: Path) -> None:
    def lower(config: dict[str, Any]) -> None:
        config[IDS] = [k - 1 for k in config[IDS]]
        if "eagle_config" in config:
            config["eagle_config"][IDS] = [k - 1 for k in config["eagle_config"][IDS]]

    edit_config(folder, lower)


def ids_in_one_meaning_only(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop(IDS))


def no_rope(folder: Path) -> None:
    def drop(config: dict[str, Any]) -> None:
        decoder = config.get("transformer_layer_config", config)
        for key in ("rope_theta", "rope_parameters", "rope_scaling"):
            del decoder[key]

    edit_config(folder, drop)


def no_d2t(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("d2t"))


def halves_swapped(folder: Path) -> None:
    def swap(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)

    edit_tensors(folder, swap)


def thirds_reversed(folder: Path) -> None:
    def turn(tensors: Tensors) -> None:
        tensors["fc.weight"] = torch.cat(tensors["fc.weight"].chunk(3, dim=1)[::-1], dim=1)

    edit_tensors(folder, turn)


def d2t_of_target_ids(folder: Path) -> None:
    def shift(tensors: Tensors) -> None:
        tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))

    edit_tensors(folder, shift)


MISTAKES = [
    ids_one_too_low,
    no_rope,
    no_d2t,
    halves_swapped,
    thirds_reversed,
    d2t_of_target_ids,
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_no_server_tells_is_found(
    case: Case, name: str, mistake: Callable[[Path], None], tmp_path: Path
) -> None:
    """Each costs acceptance only: lossless decoding hides it."""
    folder = case.export(name, tmp_path / "draft")
    mistake(folder)
    assert case.check(name, folder).problems


@pytest.mark.parametrize("name", ["vllm", "speculators", "hf"])
def test_a_wrong_residual_is_found_where_the_field_is_read(case: Case, name: str, tmp_path: Path) -> None:
    """SGLang knows no such field, and always keeps the residual as it was before the norm."""
    folder = case.export(name, tmp_path / "draft")
    norm_before_residual(folder)
    assert case.check(name, folder).problems
    norm_before_residual(case.export("sglang", tmp_path / "other"))
    assert case.check("sglang", tmp_path / "other").problems == ()


def test_a_speculators_folder_without_the_residuals_field_is_found(case: Case, tmp_path: Path) -> None:
    """vLLM then takes it for true, the package for false."""
    folder = case.export("speculators", tmp_path / "draft")
    edit_config(folder, lambda config: config.pop("norm_before_residual"))
    [problem] = case.check("speculators", folder).problems
    assert problem.startswith("vLLM:")


def test_layer_ids_in_sglangs_meaning_only_are_found(case: Case, tmp_path: Path) -> None:
    """vLLM's older runner takes them for numbers of blocks."""
    folder = case.export("vllm", tmp_path / "draft")
    ids_in_one_meaning_only(folder)
    [problem] = case.check("vllm", folder).problems
    assert "older runner" in problem
    other = case.export("sglang", tmp_path / "other")
    edit_config(other, lambda config: config["eagle_config"].pop(IDS))
    assert case.check("sglang", other).problems == (), "the draft has the default layers"


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_and_an_unknown_tensor_are_found(case: Case, name: str, tmp_path: Path) -> None:
    """vLLM misses the first, SGLang the second."""
    folder = case.export(name, tmp_path / "draft")
    names = list(load_file(folder / "model.safetensors"))
    for dropped in names:
        if dropped in ("t2d", "embed_tokens.weight"):
            continue  # no server needs them
        other = case.export(name, tmp_path / dropped)
        edit_tensors(other, lambda tensors, dropped=dropped: tensors.pop(dropped))
        assert "is missing" in case.check(name, other).problems[0], dropped
    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert "no parameter takes extra" in case.check(name, folder).problems[0]


def test_clamped_positions_and_a_feedback_that_is_normed_are_found(case: Case, tmp_path: Path) -> None:
    """Fields that a server would obey."""
    for key, value in (("max_position_embeddings", 128), ("norm_output", True), ("attention_bias", True)):
        folder = case.export("vllm", tmp_path / key)
        edit_config(folder, lambda config, key=key, value=value: config.update({key: value}))
        assert case.check("vllm", folder).problems, key
