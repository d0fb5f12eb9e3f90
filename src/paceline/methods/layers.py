"""The layers that drafts share: norms, rotation and MLP, in the names and the arithmetic of Llama and Qwen 3.

Legend: B batch, L length, H hidden, I inner size, N heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Computed in float32 and returned in `dtype`, by default that of `hidden`."""
        return rms_norm(hidden, self.weight, self.eps).to(dtype or hidden.dtype)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """float32 [..., H]."""
    return F.rms_norm(hidden.float(), weight.shape, weight.float(), eps)


def rotate(states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply the tables of a `Rope` [B, L, d] to `states` [B, N, L, d]."""
    cos, sin = (table.unsqueeze(1).to(states.dtype) for table in tables)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))  # type: ignore[no-any-return]


def initialise_random(draft: nn.Module, seed: int) -> None:
    """Matrices normal with a deviation of 0.02, from `seed` alone; everything else is left as it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
