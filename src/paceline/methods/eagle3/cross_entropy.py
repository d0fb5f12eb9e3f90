"""Soft-target cross entropy through lm_head, with its gradients computed in the forward pass.

Plain autograd keeps several [M, D] float32 tensors alive per unrolled step and walks each of them
from main memory; on a CPU that costs as much as the matrix products. Here all steps' rows go through
in one call, in chunks: a chunk's logits are overwritten by the gradient with respect to them, and
what is kept are the gradients themselves, [M, H] and [D, H]. So memory of the order of D does not
grow with M or with the number of steps. The result equals the plain formula up to rounding of the
compute dtype (a test compares), and the same rows give the same bits.

Legend: M rows, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

# Enough rows that the three matrix products of a chunk run at full speed.
_CHUNK_ROWS = 512
# 64 rows of 8192 float32 logits are 2 MiB: on a CPU they stay in the second-level cache.
_BLOCK_ROWS = 64


class SoftCrossEntropy(torch.autograd.Function):
    """Use `soft_cross_entropy`; this class only carries the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        wanted: torch.Tensor,
        best: torch.Tensor,
        picked: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = _compute_dtype(hidden)
        rows, lm_head = hidden.to(dtype), weight.to(dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        hits = torch.empty_like(picked, dtype=torch.bool)
        for start in range(0, rows.shape[0], _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            logits = rows[chunk] @ lm_head.T
            losses[chunk] = _cross_entropy(logits, wanted, picked[chunk], best[picked[chunk]], hits[chunk])
            if needs_grad:
                factor = scale[chunk, None]
                hidden_grad[chunk] = (logits @ lm_head) * factor
                weight_grad += logits.T @ (hidden[chunk] * factor).to(dtype)
        if needs_grad:
            ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(losses, hits)
        return torch.dot(losses.double(), scale.double()).float(), losses, hits

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grads[0], weight_grad * grads[0], None, None, None, None


def soft_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    wanted: torch.Tensor,
    best: torch.Tensor,
    picked: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of `scale` times cross entropy float32 [], cross entropy float32 [M], hits bool [M]).

    Logits are `hidden @ weight.T` (`hidden` [M, H], `weight` [D, H]); the wanted distribution of row m
    is `wanted[picked[m]]` (float32 [*, D], each row summing to 1); `scale` float32 [M]. A row hits if
    no logit is above that of `best[picked[m]]` (int64 [*]). Only the sum carries gradients. Matrix
    products run in the autocast dtype if one is on.
    """
    return SoftCrossEntropy.apply(hidden, weight, wanted, best, picked, scale)  # type: ignore[no-untyped-call, no-any-return]


def _cross_entropy(
    logits: torch.Tensor,
    wanted: torch.Tensor,
    picked: torch.Tensor,
    best: torch.Tensor,
    hits: torch.Tensor,
) -> torch.Tensor:
    """Each row's loss, float32 [M]. `hits` are filled in; `logits` become the gradient of the loss."""
    size = _BLOCK_ROWS if logits.device.type == "cpu" else _CHUNK_ROWS
    losses = []
    for start in range(0, logits.shape[0], size):
        block = slice(start, start + size)
        scores, target = logits[block].float(), wanted[picked[block]]
        probabilities = scores.softmax(-1)
        highest = scores.amax(-1)
        # The likeliest token's probability is exp(highest - log of the sum of exponentials).
        log_total = highest - probabilities.amax(-1).log()
        losses.append(log_total - torch.linalg.vecdot(target, scores))
        hits[block] = scores.gather(1, best[block, None]).squeeze(1) >= highest
        logits[block] = probabilities.sub_(target)
    return torch.cat(losses)


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
