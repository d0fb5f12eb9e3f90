"""Losses between two distributions, with the gradient computed in the forward pass.

Plain autograd keeps several [M, D] float32 tensors alive and reads each of them from main memory, which on a
CPU costs as much as the matrix products. Here each block of rows is turned into its gradient while the CPU
cache holds it, and only that gradient is kept, in the logits' own dtype.

Legend: M rows, D draft vocabulary, b rows of a block; p the wanted distribution and q the draft's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from paceline.methods.losses.settings import BLOCK_ROWS, LossSection
from paceline.precision import without_autocast

# Draft's and wanted logits float32 [b, D] in; losses [b] and their gradient [b, D], a new tensor, out.
Rule = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# 2 MiB of float32 logits stay in a CPU's second-level cache: 64 rows of 8192 tokens, 10 of 49152.
_CPU_BLOCK_LOGITS = 1 << 19
_CPU_BLOCK_ROWS = 64


class DistributionLoss(torch.autograd.Function):
    """Use `distribution_loss`; this class only carries the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        logits: torch.Tensor,
        wanted: torch.Tensor,
        picked: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = BLOCK_ROWS
        if logits.device.type == "cpu":
            size = min(_CPU_BLOCK_ROWS, max(1, _CPU_BLOCK_LOGITS // logits.shape[1]))
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        grad = torch.empty_like(logits)
        for start in range(0, logits.shape[0], size):
            block = slice(start, start + size)
            losses[block], slope = rule(logits[block].float(), wanted[picked[block]].float())
            grad[block] = slope.mul_(scale[block, None])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses.double(), scale.double()).float(), losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return None, grad * grads[0], None, None, None


def distribution_loss(
    section: LossSection,
    logits: torch.Tensor,
    wanted: torch.Tensor,
    picked: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of `scale` times the loss float32 [], each row's loss float32 [M]) of `logits` [M, D].

    The wanted distribution of row m is the softmax of `wanted[picked[m]]` (any float dtype [*, D]);
    `scale` float32 [M]. Only the sum carries gradients. Softmax and sums are float32, and every gradient is
    finite for finite logits.
    """
    rule = partial(_lk_lambda, eta=section.eta) if section.name == "lk_lambda" else _RULES[section.name]
    with without_autocast(logits.device):  # it would round the factors of dot products
        return DistributionLoss.apply(rule, logits, wanted, picked, scale)  # type: ignore[no-untyped-call, no-any-return]


def _soft_cross_entropy(scores: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    target, probabilities = wanted.softmax(-1), scores.softmax(-1)
    losses = _log_total(scores, probabilities) - torch.linalg.vecdot(target, scores)
    return losses, probabilities.sub_(target)


def _kl(scores: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    target, probabilities = wanted.softmax(-1), scores.softmax(-1)
    return _divergence(scores, wanted, probabilities, target), probabilities.sub_(target)


def _tv(scores: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    target, probabilities = wanted.softmax(-1), scores.softmax(-1)
    variation, pull = _variation(probabilities, target)
    return variation, probabilities.mul_(pull)


def _lk_alpha(scores: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In logarithms: where p and q hardly overlap, alpha is too small for a float32."""
    log_draft, log_target = scores.log_softmax(-1), wanted.log_softmax(-1)
    log_alpha = torch.minimum(log_draft, log_target).logsumexp(-1)
    # Divided by alpha, the lacking share of q is at most 1.
    lacking = torch.where(log_draft < log_target, (log_draft - log_alpha[:, None]).exp_(), 0.0)
    share = lacking.sum(-1, keepdim=True)
    return -log_alpha, log_draft.exp_().mul_(share).sub_(lacking)


def _lk_lambda(scores: torch.Tensor, wanted: torch.Tensor, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of the divergence is a constant for the gradient, as in the paper."""
    target, probabilities = wanted.softmax(-1), scores.softmax(-1)
    divergence = _divergence(scores, wanted, probabilities, target)
    variation, pull = _variation(probabilities, target)
    weight = (-eta * (1.0 - variation)).exp_()
    losses = weight * divergence + (1.0 - weight) * variation
    pull.mul_(1.0 - weight[:, None]).add_(weight[:, None])
    return losses, probabilities.mul_(pull).sub_(target.mul_(weight[:, None]))


def _log_total(scores: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Logarithm [b] of the sum of exponentials: the likeliest token's probability is exp(highest - it)."""
    return scores.amax(-1) - probabilities.amax(-1).log()


def _divergence(
    scores: torch.Tensor, wanted: torch.Tensor, probabilities: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The forward divergence [b] of q from p, for their logits and themselves."""
    totals = _log_total(scores, probabilities) - _log_total(wanted, target)
    return totals.add_(torch.linalg.vecdot(target, wanted - scores))


def _variation(probabilities: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(total variation [b], what multiplied by q is its gradient by the logits [b, D]).

    More of a token helps where q < p; a logit that rises takes from all other tokens in proportion.
    """
    lacking = (probabilities < target).to(probabilities.dtype)
    share = torch.linalg.vecdot(probabilities, lacking)
    variation = torch.linalg.vecdot(target, lacking) - share
    return variation, lacking.neg_().add_(share[:, None])


_RULES: Mapping[str, Rule] = {
    "soft_cross_entropy": _soft_cross_entropy,
    "kl": _kl,
    "tv": _tv,
    "lk_alpha": _lk_alpha,
}
