"""The parts of the target that a draft needs: embedding, final norm and lm_head, nothing else.

Reads config.json and the few named tensors straight from the safetensors file(s) of a Hugging
Face folder, so that the trainer never holds the target's decoder layers. Tensors keep their
stored dtype and are frozen. `layer_tensors` reads one decoder layer more, for an initialisation.
Fails with ConfigError before any training: a missing file, name or config value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from paceline.errors import ConfigError

_EMBED = "model.embed_tokens.weight"
_NORM = "model.norm.weight"
_LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class TargetHead:
    """V = target vocabulary, H = hidden size. `config` is the target's config.json as a dict."""

    config: Mapping[str, Any]
    embed_tokens: torch.Tensor  # [V, H]
    norm_weight: torch.Tensor  # [H]
    lm_head: torch.Tensor  # [V, H]; the same tensor as embed_tokens where the target ties them
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path) -> TargetHead:
        """Read the head of the target in `folder`. Raises ConfigError if it is not one we can read."""
        folder = Path(folder)
        config = _read_config(folder)
        tied = bool(config.get("tie_word_embeddings", False))
        wanted = [_EMBED, _NORM] if tied else [_EMBED, _NORM, _LM_HEAD]
        tensors = read_tensors(folder, wanted)
        return cls(
            config=config,
            embed_tokens=tensors[_EMBED],
            norm_weight=tensors[_NORM],
            lm_head=tensors[_EMBED if tied else _LM_HEAD],
            folder=folder,
        )

    @property
    def hidden_size(self) -> int:
        return int(self.embed_tokens.shape[1])

    @property
    def vocab_size(self) -> int:
        return int(self.embed_tokens.shape[0])

    @property
    def num_hidden_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def rms_norm_eps(self) -> float:
        return float(self.config.get("rms_norm_eps", 1e-6))

    @property
    def rope_theta(self) -> float:
        """RoPE base. transformers 5 nests it in `rope_parameters`; older files have it at top level."""
        nested = self.config.get("rope_parameters") or {}
        return float(nested.get("rope_theta", self.config.get("rope_theta", 10000.0)))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.config.get("eos_token_id")
        if value is None:
            return ()
        return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Weights of decoder layer `index` (0-based), named as below `model.layers.{index}.`.

        Raises ConfigError if this head was built without a folder or the layer has other names.
        """
        if self.folder is None:
            raise ConfigError(
                f"the weights of target layer {index} were asked of a head that has no model folder",
                why="a draft initialised from a target layer must read it from the target's files",
                next="load the head with TargetHead.load(folder) or choose init = 'random'",
            )
        names = [f"self_attn.{name}_proj" for name in "qkvo"]
        names += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        names += ["input_layernorm", "post_attention_layernorm"]
        prefix = f"model.layers.{index}."
        tensors = read_tensors(self.folder, [f"{prefix}{name}.weight" for name in names])
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no config.json",
            why="the draft takes its sizes from the target's config",
            next=f"ls {folder}  # is this a Hugging Face model folder?",
        )
    config: dict[str, Any] = json.loads(path.read_text())
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    missing = [key for key in needed if key not in config]
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}",
            why="the draft takes its sizes from the target's config",
            next="use a text decoder (Llama family) as target",
        )
    return config


def read_tensors(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """The named tensors from `model.safetensors` or its shards. Raises ConfigError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    elif (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise ConfigError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json",
            why="only safetensors weights are read; pickled weights can run code",
            next=f"ls {folder}  # convert the model with save_pretrained(safe_serialization=True)",
        )
    missing = [name for name in names if name not in weight_map]
    if missing:
        raise ConfigError(
            f"{folder} has no tensor named {missing[0]} ({len(missing)} of {len(names)} names missing)",
            why="the draft shares the target's embedding, final norm and lm_head",
            next="use a target whose weights carry Llama names",
        )
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted({weight_map[name] for name in names}):
        with safe_open(folder / shard, framework="pt") as file:
            for name in names:
                if weight_map[name] == shard:
                    tensors[name] = file.get_tensor(name)
    return tensors
