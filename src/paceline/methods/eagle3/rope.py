"""Rotary embedding of the draft's attention: the target's, in Llama's half-split layout.

A scaling whose frequencies are fixed is taken over from the target, because servers give the draft the
target's positions. One that changes with the length of the text (dynamic, longrope) is left out: the draft
then has plain frequencies, and its export says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from paceline.methods.eagle3.model import Eagle3Config

FIXED = ("linear", "llama3", "yarn")


def rope_scaling_of(target: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling in a target's config.json, without its base; None if there is none that is fixed."""
    kind = rope_kind(target)
    if kind not in FIXED:
        return None
    found = {name: value for name, value in _parameters(target).items() if name not in ("type", "rope_theta")}
    found.setdefault("original_max_position_embeddings", target.get("max_position_embeddings"))
    return {**found, "rope_type": kind}


def rope_kind(config: Mapping[str, Any]) -> str:
    """The kind of rotary embedding in a config.json, under its newer or its older name."""
    nested = _parameters(config)
    return str(nested.get("rope_type") or nested.get("type") or "default")


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found: Mapping[str, Any] = nested.get("full_attention", nested)
    return found


@dataclass(frozen=True)
class Rope:
    """`inverse`: the angle per position, float32 [d/2] on the CPU; None: from `theta`, without scaling."""

    head_dim: int
    theta: float
    inverse: torch.Tensor | None = None
    factor: float = 1.0

    @classmethod
    def of(cls, config: Eagle3Config) -> Rope:
        if not config.rope_scaling:
            return cls(config.head_dim, config.rope_theta)
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        library = LlamaConfig(
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={**config.rope_scaling, "rope_theta": config.rope_theta},
        )
        inverse, factor = ROPE_INIT_FUNCTIONS[config.rope_scaling["rope_type"]](library, torch.device("cpu"))
        return cls(config.head_dim, config.rope_theta, inverse, float(factor))

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) float32 [*positions.shape, d]."""
        angles = positions.float().unsqueeze(-1) * self._inverse(positions.device)
        angles = torch.cat((angles, angles), dim=-1)
        if self.factor == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.factor, angles.sin() * self.factor

    def _inverse(self, device: torch.device) -> torch.Tensor:
        if self.inverse is not None:
            return self.inverse.to(device)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        return 1.0 / self.theta**exponents
