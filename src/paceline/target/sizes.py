"""A target's sizes under the usual names, whatever its family's config.json calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paceline.target.model import library_config, text_config

HEAD_DIM = 64  # of the draft, if the target has no attention heads


def sizes_by_library(folder: Path) -> dict[str, Any]:
    """The sizes that a draft takes from its target. Raises ConfigError."""
    config = text_config(library_config(folder))
    hidden = int(config.hidden_size)
    heads = _count(config, "num_attention_heads") or max(1, hidden // HEAD_DIM)
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": int(config.num_hidden_layers),
        "num_attention_heads": heads,
        "num_key_value_heads": _count(config, "num_key_value_heads") or heads,
        "intermediate_size": _count(config, "intermediate_size") or 4 * hidden,
        "head_dim": _count(config, "head_dim") or hidden // heads,
        "rope_parameters": getattr(config, "rope_parameters", None) or {},
    }
    positions = _count(config, "max_position_embeddings")
    return sizes if positions is None else {**sizes, "max_position_embeddings": positions}


def _count(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except Exception:  # noqa: BLE001 (a size that differs from layer to layer: the library refuses to name one)
        return None
    return value if isinstance(value, int) and value > 0 else None
