"""The sizes that a draft takes over from its target."""

from __future__ import annotations

from typing import Any

from paceline.methods.rope import rope_scaling_of
from paceline.target.head import TargetHead


def sizes_of_target(head: TargetHead) -> dict[str, Any]:
    """Widths, heads, vocabulary, norm and rotary embedding, under the names of config.json."""
    config, heads = head.config, int(head.config["num_attention_heads"])
    return {
        "hidden_size": head.hidden_size,
        "intermediate_size": int(config["intermediate_size"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or head.hidden_size // heads),
        "vocab_size": head.vocab_size,
        "rms_norm_eps": head.rms_norm_eps,
        "rope_theta": head.rope_theta,
        "max_position_embeddings": int(config.get("max_position_embeddings", 2048)),
        "rope_scaling": rope_scaling_of(config),
    }
