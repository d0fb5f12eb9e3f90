"""Muon in blocks: a part of its arithmetic, nearly all of its effect.

PyTorch's Muon makes a whole matrix orthogonal: five iterations whose products grow with the square of its
shorter side. A processor takes longer for them than for a small step. Here each block of rows of the shorter
side is made orthogonal by itself ("BlockMuon" in arXiv 2510.16981, where a whole update now and then keeps
long runs of large models stable; a draft's short run did without, docs/training.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

# Of the quintic iteration, for the steepest slope at 0 (arXiv 2502.16982, section 2.1).
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
RMS = 0.2  # of an update of AdamW (arXiv 2502.16982, section 2.2)


class BlockMuon(torch.optim.Optimizer):
    """Updates of matrices by their momentum, made orthogonal in blocks of at most `block_rows` rows.

    With blocks as large as the matrix the update is that of `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`, up to rounding.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float, block_rows: int
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self._block_rows = block_rows

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None  # the trainer computes gradients itself
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].lerp_(weight.grad, 1.0 - momentum)
                ahead = weight.grad.lerp(state["momentum_buffer"], momentum)  # Nesterov's
                weight.mul_(1.0 - rate * group["weight_decay"])
                weight.add_(update_of(ahead, self._block_rows), alpha=-rate)


def update_of(momentum: torch.Tensor, block_rows: int) -> torch.Tensor:
    """The update bfloat16 [n, m] of a matrix with this `momentum` [n, m], of root mean square `RMS`."""
    is_tall = momentum.shape[0] > momentum.shape[1]
    wide = momentum.mT if is_tall else momentum
    rows, columns = wide.shape
    count = -(-rows // block_rows)
    size = -(-rows // count)  # blocks of equal size, but for the last
    # Rows of zeros in the last block stay zeros and change no other.
    blocks = F.pad(wide.bfloat16(), (0, 0, 0, count * size - rows)).view(count, size, columns)
    update: torch.Tensor = orthogonal(blocks).view(-1, columns)[:rows] * (RMS * columns**0.5)
    return update.mT if is_tall else update


def orthogonal(blocks: torch.Tensor) -> torch.Tensor:
    """Matrices bfloat16 [count, rows, columns] whose rows are nearly orthonormal, from wide `blocks`."""
    blocks = blocks / blocks.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = blocks @ blocks.mT
        factors = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        blocks = torch.baddbmm(blocks, factors, blocks, beta=A)
    return blocks
