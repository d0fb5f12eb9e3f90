"""The head of a target as its folder has it: names, ties, norms, and clear errors for what is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from paceline.errors import ConfigError, EngineError
from paceline.precision import CPU
from paceline.target.folder import eos_token_ids, read_config
from paceline.target.head import TargetHead
from paceline.target.layout import PLAIN, decoder_parts, head_layout, layout_by_library
from paceline.target.model import load_whole
from paceline.testing.tiny_families import FAMILIES, family_folder


def edit(path: Path, **values: Any) -> None:
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", sorted(PLAIN))
def test_the_library_confirms_the_families_that_are_known(tmp_path: Path, family: str) -> None:
    """What is read without the library is what its own model class says."""
    folder = family_folder(tmp_path / family, family)
    for tied in (False, True):
        edit(folder / "config.json", tie_word_embeddings=tied)
        assert head_layout(folder, read_config(folder)) == layout_by_library(folder)


def test_a_consumer_of_a_known_layout_does_not_import_the_library(tmp_path: Path) -> None:
    """Its model classes would add two seconds to every start of the role."""
    code = (
        "import sys; import paceline.roles.consumer; from paceline.target.head import TargetHead; "
        "TargetHead.load(sys.argv[1]); sys.exit('transformers' in sys.modules)"
    )
    folder = family_folder(tmp_path / "model", "llama")
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_heads_logits_are_the_models_own(tmp_path: Path, family: str) -> None:
    """Norm, lm_head, biases, scales and caps, from the states before the final norm."""
    folder = family_folder(tmp_path / "model", family)
    model = load_whole(folder, torch.float32, CPU, None)
    head, kept = TargetHead.load(folder), []
    decoder_parts(model).layers[-1].register_forward_hook(
        lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        own = model(torch.arange(3, 20)[None]).logits
        rows = torch.tensor([5, 3, 40])
        torch.testing.assert_close(head.output()(kept[0]), own, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(head.output(rows)(kept[0]), own[..., rows], atol=1e-4, rtol=1e-4)


def test_a_target_that_does_not_fit_on_its_device_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when memory ends while the weights move there; the folder is not called broken."""

    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(EngineError, match="does not fit into the memory of cpu"):
        load_whole(family_folder(tmp_path / "model", "gemma2"), torch.float32, CPU, None)


def test_a_head_is_tied_where_the_models_class_ties_it(tmp_path: Path) -> None:
    """config.json says nothing of it, and there is no lm_head.weight: as the library loads it."""
    folder = family_folder(tmp_path / "model", "gemma")
    edit(folder / "config.json", tie_word_embeddings=None)
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings
    head = TargetHead.load(folder)
    assert head.lm_head is head.embed_tokens


def test_the_head_of_a_quantised_target_is_read_where_it_is_plain(folder: Path) -> None:
    """Whatever engine runs the target; the codes of its layers are not taken for weights."""
    before = TargetHead.load(folder)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8"})
    change_weights(
        folder,
        lambda w: w.update({n: t.to(torch.float8_e4m3fn) for n, t in w.items() if "proj" in n}),
    )
    head = TargetHead.load(folder)
    assert torch.equal(head.lm_head, before.lm_head)
    with pytest.raises(ConfigError, match=r"self_attn.q_proj.weight in .* is quantised"):
        head.layer_tensors(7)


def test_a_tied_weight_that_is_stored_twice_is_read_as_the_library_reads_it(folder: Path) -> None:
    """Equal: one tensor. Unequal: two, whatever config.json says."""
    edit(folder / "config.json", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(TargetHead.load(folder).lm_head, model.lm_head.weight)
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    head = TargetHead.load(folder)
    assert head.lm_head is head.embed_tokens


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 2]}, (7, 2)),
        ({"eos_token_id": 2}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [3, 3]}, {"temperature": 1}, (3,)),
        ({"eos_token_id": -1}, {}, ()),
        ({}, {}, ()),
    ],
)
def test_answers_end_as_the_librarys_own_generate_ends_them(
    config: dict[str, Any], generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    """generation_config.json has the word, config.json where it says nothing."""
    assert eos_token_ids(config, generation) == expected


@pytest.mark.parametrize("value", [-5, [2, -5], "2", True, [[2]]])
def test_what_is_no_token_ends_no_answer(value: object) -> None:
    """Capture would otherwise let every answer run on to its limit."""
    with pytest.raises(ConfigError, match="not a token id or a list of them"):
        eos_token_ids({"eos_token_id": 2}, {"eos_token_id": value})


def test_the_head_ends_answers_where_capture_does(folder: Path) -> None:
    """Evaluation and draft vocabulary know the end-of-turn token that only generation_config.json lists."""
    edit(folder / "generation_config.json", eos_token_id=[9, 2, 500])
    assert TargetHead.load(folder).eos_token_ids == (9, 2)


def nan_in_lm_head(folder: Path) -> None:
    change_weights(folder, lambda w: w["lm_head.weight"][17].fill_(float("nan")))


def infinite_embedding(folder: Path) -> None:
    change_weights(folder, lambda w: w["model.embed_tokens.weight"][3, 2].fill_(float("inf")))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def index(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(content)

    return write


def config(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(content)

    return write


def config_with(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **values)


def no_regular_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def quantised_head(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    change_weights(folder, lambda w: w.update({"lm_head.qweight": w.pop("lm_head.weight").int()}))


def head_of_codes(folder: Path) -> None:
    change_weights(
        folder, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.float8_e4m3fn)})
    )


DAMAGES = [
    (nan_in_lm_head, "lm_head.weight.*not finite.*row 17"),
    (infinite_embedding, "embed_tokens.weight.*not finite.*row 3"),
    (truncated, "cannot be read"),
    (empty, "cannot be read"),
    (no_weights, "neither model.safetensors"),
    (huge_header, "cannot be read"),
    (index("{}"), "no weight_map"),
    (index("[1]"), "holds a list"),
    (index('{"weight_map": {"model.embed_tokens.weight": "../other.safetensors"}}'), "names '../other"),
    (index('{"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}'), "no tensor named"),
    (config(""), "config.json cannot be read"),
    (config("[]"), "holds a list"),
    (config("[" * 100_000), "config.json cannot be read"),
    (config("{}"), "no model_type"),
    (config_with(num_hidden_layers="many"), "num_hidden_layers"),
    (config_with(model_type="no_such_family"), "not a configuration that transformers can read"),
    (config_with(model_type="vit"), "no causal language model|Embedding"),
    (quantised_head, "lm_head.weight in .* is quantised: the folder has no such tensor .gptq"),
    (head_of_codes, "lm_head.weight in .* is quantised: it is stored as float8_e4m3fn"),
    (no_regular_file, "There is no model"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_broken_folder_is_one_clear_error(
    folder: Path, damage: Callable[[Path], None], reason: str
) -> None:
    """Of exit code 2, which the supervisor does not restart, with the folder and what to do."""
    damage(folder)
    with pytest.raises(ConfigError, match=reason) as caught:
        TargetHead.load(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == 2
    assert caught.value.next
