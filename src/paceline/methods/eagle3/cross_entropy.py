"""Soft-target cross entropy through lm_head, with its gradients computed in the forward pass.

Plain autograd keeps several [M, D] float32 tensors alive per unrolled step and walks each of them
from main memory; on a CPU that costs as much as the matrix products. Here rows go through in blocks
that fit a core's cache, and what is kept is one [M, D] matrix in the compute dtype for the length
of the call. The result equals the plain formula up to rounding of that dtype (a test compares).

Legend: M rows, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

# 64 rows of 8192 float32 logits are 2 MiB: they stay in the second-level cache.
_BLOCK_ROWS = 64


class SoftCrossEntropy(torch.autograd.Function):
    """Use `soft_cross_entropy`; this class only carries the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor, picked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = _compute_dtype(hidden)
        rows, lm_head = hidden.to(dtype), weight.to(dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        residual = rows.new_empty(rows.shape[0], weight.shape[0]) if needs_grad else None
        top = picked.new_empty(rows.shape[0])
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, rows.shape[0], _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            log_probabilities = (rows[block] @ lm_head.T).float().log_softmax(-1)
            target = wanted[picked[block]]
            top[block] = log_probabilities.argmax(-1)
            loss -= torch.dot(target.flatten(), log_probabilities.flatten())
            if residual is not None:
                residual[block] = log_probabilities.exp_().sub_(target)
        if residual is not None:
            ctx.save_for_backward((residual @ lm_head).to(hidden.dtype), (residual.T @ rows).to(weight.dtype))
        ctx.mark_non_differentiable(top)
        return loss.float(), top

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grads[0], weight_grad * grads[0], None, None


def soft_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor, picked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed cross entropy float32 [], argmax int64 [M]) of logits `hidden @ weight.T`.

    `hidden` [M, H], `weight` [D, H]; the wanted distribution of row m is `wanted[picked[m]]`
    (float32 [*, D], each row summing to 1). Matrix products run in the autocast dtype if one is on.
    """
    return SoftCrossEntropy.apply(hidden, weight, wanted, picked)  # type: ignore[no-untyped-call, no-any-return]


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
