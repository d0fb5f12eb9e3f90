"""Rotary embedding of the draft's attention: the target's, in Llama's half-split layout.

A scaling whose frequencies are fixed is taken over from the target, because servers give the draft the
target's positions. One that changes with the length of the text (dynamic, longrope) is left out: the draft
then has plain frequencies, and the card of its export says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from paceline.errors import ConfigError
from paceline.target.rope import rope_kind, rope_parameters


class RopeSizes(Protocol):
    """What decides the tables; a draft's config has it."""

    @property
    def head_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def rope_scaling(self) -> Mapping[str, Any] | None: ...


_CONTEXT = "original_max_position_embeddings"
# What each kind of scaling reads. A target's other entries are not for the draft, which turns whole heads.
READ = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT),
    "yarn": (
        *("factor", _CONTEXT, "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
}


def rope_scaling_of(target: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling in a target's config.json, without its base; None if there is none that is fixed."""
    kind = rope_kind(target)
    if kind not in READ:
        return None
    given = {_CONTEXT: target.get("max_position_embeddings"), **rope_parameters(target)}
    return {"rope_type": kind, **{key: given[key] for key in READ[kind] if given.get(key) is not None}}


@dataclass(frozen=True)
class Rope:
    """`inverse`: the angle per position, float32 [d/2] on the CPU; None: from `theta`, without scaling."""

    head_dim: int
    theta: float
    inverse: torch.Tensor | None = None
    factor: float = 1.0
    # `inverse` by device: to copy it there in every step would make the host wait for the device.
    _there: dict[torch.device, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, config: RopeSizes) -> Rope:
        """Raises ConfigError for a scaling that gives no frequencies."""
        if not config.rope_scaling:
            return cls(config.head_dim, config.rope_theta)
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        cpu, scaling = torch.device("cpu"), {**config.rope_scaling, "rope_theta": config.rope_theta}
        try:
            library = LlamaConfig(
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters=scaling,
            )
            with cpu:  # a draft on the meta device has real tables
                inverse, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](library, cpu)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise _unusable(scaling, repr(error)) from error
        if inverse.shape != (config.head_dim // 2,) or not bool(torch.isfinite(inverse).all()):
            raise _unusable(scaling, f"they are {inverse.tolist()}")
        return cls(config.head_dim, config.rope_theta, inverse, float(factor))

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) float32 [*positions.shape, d]."""
        angles = positions.float().unsqueeze(-1) * self._inverse(positions.device)
        angles = torch.cat((angles, angles), dim=-1)
        if self.factor == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.factor, angles.sin() * self.factor

    def frequencies(self) -> torch.Tensor:
        """The angle per position, float32 [d/2] on the CPU."""
        return self._inverse(torch.device("cpu"))

    def _inverse(self, device: torch.device) -> torch.Tensor:
        if self.inverse is not None:
            if device not in self._there:
                self._there[device] = self.inverse.to(device)
            return self._there[device]
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        return 1.0 / self.theta**exponents


def _unusable(scaling: Mapping[str, Any], reason: str) -> ConfigError:
    return ConfigError(
        f"The rotary embedding {scaling} gives the draft no frequencies.",
        why=f"The draft takes over its target's scaling: {reason}.",
        next="correct rope_parameters (or rope_scaling) in the config.json that the draft follows.",
    )
