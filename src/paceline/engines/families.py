"""How the engine captures a model family: which prompts share a forward, and which attention and cache run.

Only families whose equality is tested (tests/unit/engines/test_families.py) get the engine's own attention
and cache; all others run on the library's. Either way, the probe compares the states with the model's own
before anything is captured.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from paceline.engines.attention import ATTENTION
from paceline.target.decoder import TextDecoder

OWN = frozenset({"llama", "qwen2", "qwen3"})
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


class Way(StrEnum):
    OWN = "own"  # a padded batch whose shared beginning is read once; this engine's attention and cache
    BATCH = "batch"  # a padded batch, on the library's attention and cache
    ALONE = "alone"  # one prompt at a time, on the library's attention and cache


def own_attention(config: Mapping[str, Any]) -> str | None:
    """The attention implementation to load the model with; None: the library's choice for the family."""
    return ATTENTION if _is_plain(config) else None


def way_of(decoder: TextDecoder) -> Way:
    """How to capture this model. A recurrent layer carries padding in its state, and some families take no
    position ids, so padding would shift them."""
    if decoder.config._attn_implementation == ATTENTION:
        return Way.OWN
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    recurrent = bool(getattr(decoder.model, "_is_stateful", False)) or not kinds <= _ATTENTION_LAYERS
    positions = "position_ids" in inspect.signature(decoder.parts.decoder.forward).parameters
    return Way.BATCH if positions and not recurrent else Way.ALONE


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether the family is in `OWN` and every layer attends to all earlier tokens."""
    windows = config.get("use_sliding_window") or (
        config.get("sliding_window") and config["model_type"] not in OWN
    )
    kinds = set(config.get("layer_types") or ())
    return config["model_type"] in OWN and not windows and kinds <= {"full_attention"}
