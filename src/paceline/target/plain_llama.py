"""Whether a target is the plain Llama that the evaluation's fast forward computes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.target.folder import quantisation


def why_not_plain_llama(config: Mapping[str, Any]) -> str:
    """Why the evaluation's fast forward cannot compute the model of this config.json; empty if it can."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    reasons = []
    if quantisation(config):
        reasons.append(f"it is quantised ({quantisation(config)})")
    if config.get("model_type") != "llama":
        reasons.append(f"model_type is {config.get('model_type')!r}, not 'llama'")
    if config.get("hidden_act", "silu") != "silu":
        reasons.append(f"hidden_act is {config.get('hidden_act')!r}, not 'silu'")
    if config.get("attention_bias") or config.get("mlp_bias"):
        reasons.append("its projections have biases")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        reasons.append(f"rope_type is {rope.get('rope_type', rope.get('type'))!r}, not 'default'")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        reasons.append("its rotary embedding is partial")
    return "; ".join(reasons)
