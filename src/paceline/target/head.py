"""The parts of the target that a draft needs: embedding, final norm and lm_head, nothing else.

They are read straight from the safetensors files of a Hugging Face folder, so the trainer never holds the
target's decoder layers. Tensors keep their stored dtype and are frozen. `OutputLayer` turns a captured last
state into the target's own logits, including the family's scale or cap. A missing file, name or config
value, or a weight that is NaN, is a ConfigError before any training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.errors import ConfigError
from paceline.target.facts import TargetFacts
from paceline.target.folder import (
    TensorFiles,
    eos_token_ids,
    quantisation,
    read_config,
    read_generation_config,
)
from paceline.target.layout import LLAMA, PLAIN, HeadLayout, apply_norm, bent, head_layout
from paceline.target.sizes import sizes_by_library

CHECKED_ROWS = 8192


class OutputLayer(nn.Module):
    """The target's final norm and rows of its lm_head: turns captured last states into logits.

    It has only frozen buffers, which are the target's and in no state dict.
    """

    gain: torch.Tensor  # [H]
    rows: torch.Tensor  # [D, H]
    norm_bias: torch.Tensor | None  # [H]
    row_bias: torch.Tensor | None  # [D]

    def __init__(self, head: TargetHead, token_ids: torch.Tensor | None = None) -> None:
        """Takes the rows of `token_ids` int64 [D] in that order; by default all rows, without a copy."""
        super().__init__()
        self.layout = head.layout

        def chosen(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor if tensor is None or token_ids is None else tensor[token_ids]

        self.register_buffer("gain", head.norm_weight, persistent=False)
        self.register_buffer("norm_bias", head.norm_bias, persistent=False)
        self.register_buffer("rows", chosen(head.lm_head), persistent=False)
        self.register_buffer("row_bias", chosen(head.lm_head_bias), persistent=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits float32 [..., D] of pre-norm `states` [..., H].

        The product has the target's own dtype, and so the precision of the target's own output.
        """
        normed = apply_norm(states, self.gain, self.norm_bias, self.layout).to(states.dtype)
        bias = None if self.row_bias is None else self.row_bias.to(self.rows.dtype)
        return bent(F.linear(normed.to(self.rows.dtype), self.rows, bias).float(), self.layout)


@dataclass(frozen=True)
class TargetHead:
    """V = target vocabulary, H = hidden size. `config` is the target's config.json as a dict.

    `norm_weight` is the effective gain of the final norm: 1 + w where the family stores w.
    """

    config: Mapping[str, Any]
    embed_tokens: torch.Tensor  # [V, H]
    norm_weight: torch.Tensor  # [H]
    lm_head: torch.Tensor  # [V, H]; the same tensor as embed_tokens where the target ties them
    folder: Path | None = None
    layout: HeadLayout = LLAMA
    norm_bias: torch.Tensor | None = None  # [H]
    lm_head_bias: torch.Tensor | None = None  # [V]
    eos_token_ids: tuple[int, ...] = ()  # tokens that end an answer, all within the vocabulary

    @classmethod
    def load(cls, folder: str | Path) -> TargetHead:
        """Read the head of the target in `folder`. Raises ConfigError if it cannot be read."""
        folder = Path(folder)
        config = read_config(folder)
        files = TensorFiles(folder)
        layout = head_layout(folder, config)
        if (method := quantisation(config)) and layout.lm_head not in files:
            raise _quantised(folder, layout.lm_head, f"the folder has no such tensor ({method})")
        wanted = [layout.embedding, layout.norm, layout.lm_head, layout.norm_bias, layout.lm_head_bias]
        tensors = files.read(list(dict.fromkeys(name for name in wanted if name)))
        for name, tensor in tensors.items():
            _refuse_codes(folder, name, tensor)
            _refuse_not_finite(folder, name, tensor)
        embedding, lm_head = tensors[layout.embedding], tensors[layout.lm_head]
        _refuse_unequal(folder, layout, tensors)
        gain = tensors[layout.norm] if layout.norm else torch.ones(embedding.shape[1])
        ends = eos_token_ids(config, read_generation_config(folder))
        return cls(
            config=config if config["model_type"] in PLAIN else {**config, **sizes_by_library(folder)},
            embed_tokens=embedding,
            norm_weight=gain.float() + layout.gain_offset if layout.gain_offset else gain,
            lm_head=embedding if _are_equal(embedding, lm_head) else lm_head,
            folder=folder,
            layout=layout,
            norm_bias=tensors[layout.norm_bias] if layout.norm_bias else None,
            lm_head_bias=tensors[layout.lm_head_bias] if layout.lm_head_bias else None,
            eos_token_ids=tuple(token for token in ends if token < embedding.shape[0]),
        )

    @property
    def facts(self) -> TargetFacts:
        """The facts that follow from the head alone, without the target's family and version."""
        dtype = str(self.embed_tokens.dtype).removeprefix("torch.")
        return TargetFacts.by_sizes(self, dtype, eos_token_ids=self.eos_token_ids, version="unknown")

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
        return self.layout.eps

    @property
    def rope_theta(self) -> float:
        """RoPE base. transformers 5 nests it in `rope_parameters`; older files have it at top level.

        If the family has one base per kind of layer, the base of full attention.
        """
        nested = self.config.get("rope_parameters") or {}
        nested = nested.get("full_attention", nested)
        return float(nested.get("rope_theta") or self.config.get("rope_theta") or 10000.0)

    def output(self, token_ids: torch.Tensor | None = None) -> OutputLayer:
        return OutputLayer(self, token_ids)

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Weights of decoder layer `index` (0-based), named as below `model.layers.{index}.`.

        Raises ConfigError if this head was built without a folder or the layer has other names.
        """
        prefix = f"model.layers.{index}."
        names = [f"{prefix}self_attn.{name}_proj.weight" for name in "qkvo"]
        names += [f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        names += [f"{prefix}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
        files = TensorFiles(self.folder) if self.folder else None
        other_norms = bool(self.layout.gain_offset) or self.layout.centred
        if files is None or other_norms or any(name not in files for name in names):
            missing = next((name for name in names if files and name not in files), "a model folder")
            missing = "plain RMSNorm" if other_norms else missing
            raise ConfigError(
                f"The target's layer {index} cannot be read as a Llama layer: there is no {missing}.",
                why="Its weights have other names (mixture of experts, fused projections, other norms).",
                next='set method.init to "regression" or "random"',
            )
        tensors = files.read(names)
        for name, tensor in tensors.items():
            _refuse_codes(files.folder, name, tensor)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _refuse_codes(folder: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise _quantised(folder, name, f"it is stored as {str(tensor.dtype).removeprefix('torch.')}")


def _quantised(folder: Path, name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{name} in {folder} is quantised: {reason}.",
        why="The draft is trained against the plain numbers of embedding, final norm and lm_head.",
        next="choose a checkpoint of that model whose embedding and lm_head are not quantised.",
    )


def _are_equal(embedding: torch.Tensor, lm_head: torch.Tensor) -> bool:
    """Whether one tensor serves as both. Some folders store a tied weight twice."""
    return embedding is lm_head or (embedding.dtype == lm_head.dtype and torch.equal(embedding, lm_head))


def _refuse_not_finite(folder: Path, name: str, tensor: torch.Tensor) -> None:
    for start in range(0, tensor.shape[0], CHECKED_ROWS):
        rows = tensor[start : start + CHECKED_ROWS]
        sums = rows.reshape(rows.shape[0], -1).sum(-1, dtype=torch.float32)
        if not bool(torch.isfinite(sums).all()):
            row = start + int((~torch.isfinite(sums)).nonzero()[0])
            raise ConfigError(
                f"{name} in {folder} is not finite (first in row {row}).",
                why="Every target distribution would be NaN and no draft can be trained on it.",
                next="the target itself is damaged: fetch it again, or choose another one.",
            )


def _refuse_unequal(folder: Path, layout: HeadLayout, tensors: Mapping[str, torch.Tensor]) -> None:
    embedding, lm_head = tensors[layout.embedding].shape, tensors[layout.lm_head].shape
    if len(embedding) != 2 or embedding != lm_head:
        raise ConfigError(
            f"Embedding {tuple(embedding)} and lm_head {tuple(lm_head)} of {folder} differ in shape.",
            why="The draft reads tokens through the embedding and predicts them through lm_head.",
            next="choose a target whose embedding and lm_head have one size.",
        )
