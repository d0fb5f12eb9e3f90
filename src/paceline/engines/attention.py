"""Grouped-head attention for a single token that does not copy the cache.

The stock attention copies every key and value once per head of its group, which costs several times the
product itself. Here the heads of a group take the place of query positions: the same sums without a copy.
Every other case goes to the stock attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 (the name PyTorch's own documents use)
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "paceline"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [B, n, heads, d] from query [B, heads, n, d] and key, value [B, groups, m, d]."""
    rows, heads, length, width = query.shape
    if length > 1 or heads == key.shape[1]:
        stock: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return stock
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], width)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(rows, 1, heads, width), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
