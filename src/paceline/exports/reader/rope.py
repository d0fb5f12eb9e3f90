"""Rotary embedding from a config: which base and scaling a server reads, and the frequencies they give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

THETA = 10000.0  # what servers take if the config names no base


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` that a server makes of a config, in the nested or the older form.

    Raises ValueError if the config has both forms and they differ.
    """
    nested, older = config.get("rope_parameters"), config.get("rope_scaling")
    legacy = {"rope_type": "default", **(older or {}), "rope_theta": config.get("rope_theta", THETA)}
    if nested is None:
        return _named(legacy)
    read = _named({"rope_type": "default", **nested})
    read["rope_theta"] = nested.get("rope_theta", THETA)
    if ("rope_theta" in config or older) and read != _named(legacy):
        raise ValueError(f"rope_parameters {read} and rope_theta with rope_scaling {legacy} differ")
    return read


def _named(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """With `rope_type` for its older name."""
    read = dict(parameters)
    kind = read.pop("type", None)
    if kind is not None and read.get("rope_type") in (None, "default"):
        read["rope_type"] = kind
    return read


def frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[torch.Tensor, float]:
    """(angle per position float64 [d/2], factor on cosine and sine). Raises ValueError for unknown kinds."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = float(rope["rope_theta"]) ** -steps
    kind = rope["rope_type"]
    if kind == "default":
        return plain, 1.0
    factor = float(rope["factor"])
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        return _llama3(plain, rope, factor), 1.0
    if kind == "yarn":
        return _yarn(plain, rope, factor, head_dim)
    raise ValueError(f"no server reads a fixed rotary embedding of the kind {kind!r}")


def turned(states: torch.Tensor, angles: torch.Tensor, sharpness: float, first: int = 0) -> torch.Tensor:
    """`states` [N, L, d] of the positions from `first` on: a pair is one element of each half."""
    positions = torch.arange(first, first + states.shape[1]).float()
    turns = torch.outer(positions, angles.float())
    cosine, sine = (sharpness * part for part in (turns.cos(), turns.sin()))
    one, other = states.chunk(2, dim=-1)
    return torch.cat((one * cosine - other * sine, other * cosine + one * sine), dim=-1)


def _llama3(plain: torch.Tensor, rope: Mapping[str, Any], factor: float) -> torch.Tensor:
    """Long waves are stretched, short ones kept, and those between mixed."""
    turns = float(rope["original_max_position_embeddings"]) * plain / (2 * math.pi)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return plain * kept + plain / factor * (1.0 - kept)


def _yarn(
    plain: torch.Tensor, rope: Mapping[str, Any], factor: float, head_dim: int
) -> tuple[torch.Tensor, float]:
    """As llama3, but mixed over the number of the frequency; attention becomes a little sharper.

    The bounds of the mixture are whole numbers, unless `truncate` is false.
    """
    length, base = rope["original_max_position_embeddings"], math.log(float(rope["rope_theta"]))

    def place(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * base)

    first, last = place(float(rope.get("beta_fast") or 32.0)), place(float(rope.get("beta_slow") or 1.0))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - first) / ((last - first) or 0.001)
    stretched = ramp.clamp(0.0, 1.0)
    return plain * (1.0 - stretched) + plain / factor * stretched, _sharper(rope, factor)


def _sharper(rope: Mapping[str, Any], factor: float) -> float:
    """Yarn's factor on cosine and sine: given, or a ratio of two, or of the factor alone."""

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(float(rope["mscale"])) / of(float(rope["mscale_all_dim"]))
    return of(1.0)
