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
ROWS = 32  # of a group that a CPU attends for at a time: what their padding has in common is not read
COARSE = 64.0  # a score that bfloat16 rounds by a quarter, and its weight by as much


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
    on_cpu = query.device.type == "cpu"
    if length > 1 or (heads == key.shape[1] and not on_cpu):
        stock: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return stock
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], width)
    if on_cpu:
        mixed = _in_parts(grouped, key, value, attention_mask, width**-0.5 if scaling is None else scaling)
    else:
        mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(rows, 1, heads, width), None


def _in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Some rows at a time, from the first position on that one of them attends to.

    `mask`: bool [B, 1, 1, m]. Two products with keys that lie column by column (cache.py) take half the time
    of the library's fused kernel, which is made for many queries. That kernel has scores of float32; the
    product has the type of its factors, so large ones, which biases of keys give, are computed again.
    """
    mixed = torch.empty_like(query)
    for first in range(0, len(query), ROWS):
        part, begin = slice(first, first + ROWS), 0
        hidden = None if mask is None else ~mask[part]
        if hidden is not None:
            begin = int((~hidden.all(0)).flatten().int().argmax())
            hidden = hidden[..., begin:]
        asked, keys = query[part], key[part, :, begin:].transpose(-1, -2)
        scores = (asked @ keys).float().mul_(scaling)
        if asked.dtype != torch.float32 and float(scores.abs().amax()) > COARSE:
            scores = (asked.float() @ keys.float()).mul_(scaling)
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        torch.matmul(scores.softmax(-1).to(query.dtype), value[part, :, begin:], out=mixed[part])
    return mixed


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
