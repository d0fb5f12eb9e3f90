"""Soft-target cross entropy of logits, with the gradient computed in the forward pass.

Plain autograd keeps several [M, D] float32 tensors alive and reads each of them from main memory, which on a
CPU costs as much as the matrix products. Here each block of rows is turned into its gradient while the CPU
cache holds it, and only that gradient is kept, in the logits' own dtype.

Legend: M rows, D draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

# 64 rows of 8192 float32 logits are 2 MiB, which stay in a CPU's second-level cache.
_CPU_BLOCK_ROWS = 64
_BLOCK_ROWS = 512


class SoftCrossEntropy(torch.autograd.Function):
    """Use `soft_cross_entropy`; this class only carries the gradients."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, wanted: torch.Tensor, picked: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = _CPU_BLOCK_ROWS if logits.device.type == "cpu" else _BLOCK_ROWS
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        grad = torch.empty_like(logits)
        for start in range(0, logits.shape[0], size):
            block = slice(start, start + size)
            scores, target = logits[block].float(), wanted[picked[block]].float().softmax(-1)
            probabilities = scores.softmax(-1)
            # The likeliest token's probability is exp(highest - log of the sum of exponentials).
            log_total = scores.amax(-1) - probabilities.amax(-1).log()
            losses[block] = log_total - torch.linalg.vecdot(target, scores)
            grad[block] = probabilities.sub_(target).mul_(scale[block, None])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses.double(), scale.double()).float(), losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None


def soft_cross_entropy(
    logits: torch.Tensor, wanted: torch.Tensor, picked: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of `scale` times cross entropy float32 [], cross entropy float32 [M]) of `logits` [M, D].

    The wanted distribution of row m is the softmax of `wanted[picked[m]]` (any float dtype [*, D]);
    `scale` float32 [M]. Only the sum carries gradients. Softmax is float32.
    """
    return SoftCrossEntropy.apply(logits, wanted, picked, scale)  # type: ignore[no-untyped-call, no-any-return]
