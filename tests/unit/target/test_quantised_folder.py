"""A target that is quantised for tests: codes that a server reads, and the same numbers as plain weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paceline.engines.transformers import TransformersEngine
from paceline.errors import ConfigError
from paceline.target.head import TargetHead
from paceline.testing.tiny_folder import make_tiny_folder
from scripts.quantise_target import quantise


def test_codes_and_plain_weights_are_one_target_and_only_the_plain_one_runs_here(tmp_path: Path) -> None:
    """Every projection is rounded by at most half a step of its row; embedding, norms and lm_head stay."""
    model, folder, rounded = make_tiny_folder(tmp_path / "m"), tmp_path / "coded", tmp_path / "plain"
    quantise(model, folder, rounded)
    given, coded, plain = (load_file(path / "model.safetensors") for path in (model, folder, rounded))
    assert given.keys() == plain.keys()
    for name, weight in given.items():
        if f"{name}_scale" not in coded:
            assert torch.equal(coded[name], weight)
            assert torch.equal(plain[name], weight)
            continue
        assert coded[name].dtype == torch.int8
        scale = coded[f"{name}_scale"]
        assert torch.equal(coded[name].float() * scale, plain[name])
        assert ((plain[name] - weight).abs() <= scale / 2 * 1.001).all()
    assert sum(name.endswith("_scale") for name in coded) == 7 * 8
    assert torch.equal(TargetHead.load(folder).lm_head, given["lm_head.weight"])
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    TransformersEngine(rounded, dtype="float32")
    with pytest.raises(ConfigError, match=r"is quantised .compressed-tensors"):
        TransformersEngine(folder, dtype="float32")
