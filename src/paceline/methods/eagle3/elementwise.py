"""The decoder layer's elementwise parts, which keep their inputs only and compute the rest again in backward.

Plain autograd keeps every intermediate of a norm in float32 and four tensors of the MLP's inner size.
What is kept here are the input of a norm, in its own dtype, and the two projections that the MLP
multiplies. The results equal the plain formulas up to rounding (a test compares).

Legend: H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)


class RmsNorm(torch.autograd.Function):
    """Use `rms_norm`; this class only carries the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        exact = hidden.float()
        scale = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (exact * scale).mul_(weight.float()).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        grad, normed = grads[0].float(), hidden.float() * scale
        weight_grad = (grad * normed).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None, None
        grad = grad * weight.float()
        along = (grad * normed).mean(-1, keepdim=True)
        hidden_grad = grad.sub_(normed.mul_(along)).mul_(scale).to(hidden.dtype)
        return hidden_grad, weight_grad, None, None


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Llama's RMSNorm of `hidden` [..., H], computed in float32; in `dtype`, or else in that of `hidden`."""
    return RmsNorm.apply(hidden, weight, eps, dtype or hidden.dtype)  # type: ignore[no-untyped-call, no-any-return]


class GatedDown(torch.autograd.Function):
    """Use `gated_down`; this class only carries the gradients."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grad = grads[0]
        opened = F.silu(gate)
        product = (opened * up).reshape(-1, weight.shape[1])
        weight_grad = grad.reshape(-1, weight.shape[0]).T @ product
        inner_grad = grad @ weight.to(grad.dtype)
        gate_grad = torch.ops.aten.silu_backward(inner_grad * up, gate)
        return gate_grad, inner_grad.mul_(opened), weight_grad.to(weight.dtype)


def gated_down(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(silu(`gate`) * `up`) @ `weight`.T: [..., H] of `gate` and `up` [..., I], `weight` [H, I]."""
    return GatedDown.apply(gate, up, weight)  # type: ignore[no-untyped-call, no-any-return]
