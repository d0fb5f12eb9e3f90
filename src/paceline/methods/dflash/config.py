"""Sizes of a block draft: the target's, with few layers, and what its head adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DFlashConfig:
    """`depths`: how many tokens a block guesses, in its last places. `sample_from_anchor`: the first place,
    which holds the newest token, guesses the token after it."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    aux_layer_ids: tuple[int, ...]  # the target's states that are fused
    block_size: int
    mask_token_id: int
    causal: bool
    sample_from_anchor: bool
    rope_scaling: Mapping[str, Any] | None = None  # see methods/rope.py

    @property
    def depths(self) -> int:
        return self.block_size if self.sample_from_anchor else self.block_size - 1
