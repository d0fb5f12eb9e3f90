"""Checkpoints as people have them: shards, stored types, more rows than tokens. Captured as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline.engines.transformers import TransformersEngine
from paceline.errors import ConfigError
from paceline.target.head import TargetHead
from paceline.testing.engine_suite import capture, requests
from paceline.testing.tiny_families import family_folder
from paceline.testing.tiny_target import VOCAB


def stored_as(folder: Path, dtype: torch.dtype, shards: int) -> Path:
    """Rewrite the folder's weights."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, shard_of = sorted(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name].to(dtype) for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        shard_of.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_of_any_stored_type_are_captured_exactly(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """The probe compares states and distribution with the model's own, in both types of computation."""
    folder = stored_as(family_folder(tmp_path / family, family), dtype, shards=3)
    assert TargetHead.load(folder).embed_tokens.dtype == dtype
    for computed in ("float32", "bfloat16"):
        TransformersEngine(folder, dtype=computed).probe()


def test_rows_beyond_the_tokenizers_tokens_are_the_models_own(tmp_path: Path) -> None:
    """The model may write them, so the draft's vocabulary is that of the rows."""
    folder = family_folder(tmp_path / "model", "qwen2", vocab_size=3 * VOCAB)
    engine = TransformersEngine(folder, dtype="float32")
    engine.probe()
    assert engine.facts.vocab_size == TargetHead.load(folder).vocab_size == 3 * VOCAB
    assert capture(engine, requests(engine))


@pytest.mark.parametrize(
    "settings", [{"quant_method": "awq", "bits": 4}, {"quant_method": "compressed-tensors"}]
)
def test_a_quantised_target_needs_another_engine(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Said by its own name before any weight is read."""
    folder = family_folder(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ConfigError, match=f"quantised .{settings['quant_method']}") as caught:
        TransformersEngine(folder)
    assert "engine.name" in caught.value.next
