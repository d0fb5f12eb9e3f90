"""What config.json alone tells of a target: sizes, parameters, bytes of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import ConfigError
from paceline.target.shape import read_shape
from paceline.testing.tiny_target import save_target, tiny_target

TARGETS = Path(__file__).parents[2] / "targets"


@pytest.mark.parametrize(
    ("name", "billions", "active", "gigabytes"),
    [
        ("llama-3.1-8b", 8.03, 8.03, 16.1),
        ("qwen3-8b", 8.19, 8.19, 16.4),
        ("qwen3-30b-a3b", 30.5, 3.3, 61.1),
        ("gpt-oss-20b", 20.9, 4.2, 13.8),
    ],
)
def test_parameters_of_known_targets(name: str, billions: float, active: float, gigabytes: float) -> None:
    """As their makers state them (gpt-oss: 3.6 B active without the embedding); experts and MXFP4 counted."""
    shape = read_shape(TARGETS / name)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.03)
    assert shape.weights_bytes / 1e9 == pytest.approx(gigabytes, rel=0.03)
    assert not shape.has_weights


def test_weights_that_are_there_are_weighed(tmp_path: Path) -> None:
    """In one file or in shards; shards that are missing are not there."""
    whole = save_target(tiny_target(), tmp_path / "whole")
    shape = read_shape(whole)
    assert shape.weights_bytes == (whole / "model.safetensors").stat().st_size
    assert shape.parameters == pytest.approx(shape.weights_bytes / 4, rel=0.05)
    shards = save_target(tiny_target(), tmp_path / "shards", max_shard_size="40KB")
    paths = sorted(shards.glob("*.safetensors"))
    assert len(paths) > 1
    assert read_shape(shards).weights_bytes == sum(path.stat().st_size for path in paths)
    paths[0].unlink()
    assert not read_shape(shards).has_weights


@pytest.mark.parametrize(
    "names",
    [
        {"n_embd": 64, "n_layer": 8, "n_head": 4, "n_positions": 512},
        {"d_model": 64, "n_layers": 8, "n_heads": 4, "max_seq_len": 512},
        {"text_config": {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4}},
    ],
)
def test_a_size_has_other_names_in_other_families(tmp_path: Path, names: dict[str, Any]) -> None:
    told = {"model_type": "another", "vocab_size": 100, **names}
    (tmp_path / "config.json").write_text(json.dumps(told))
    sizes = read_shape(tmp_path).sizes
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.head_dim) == (64, 8, 16)


def test_a_config_without_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x", "hidden_size": 64}')
    with pytest.raises(ConfigError, match="how wide and deep"):
        read_shape(tmp_path)
