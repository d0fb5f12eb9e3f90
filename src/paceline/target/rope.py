"""Which kind of rotary embedding a config.json asks for. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def rope_kind(config: Mapping[str, Any]) -> str:
    """The kind of rotary embedding in a config.json, under its newer or its older name."""
    nested = rope_parameters(config)
    return str(nested.get("rope_type") or nested.get("type") or "default")


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of full attention, if the kinds of layer have their own; without the base in older files."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found: Mapping[str, Any] = nested.get("full_attention", nested)
    return found
