"""The loss of a block draft: each guess against the target's distribution, weighted by its depth.

Legend: A anchors, D guesses of a block, a anchors of a group, m target rows of a group, H hidden, V
vocabulary, r size of a latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from paceline.methods.dflash.attention import attention_over
from paceline.methods.dflash.batch import DFlashBatch
from paceline.methods.dflash.heads.head import Places, Rows
from paceline.methods.dflash.settings import WeightingSection
from paceline.methods.losses.distribution import distribution_loss
from paceline.methods.method import LossSums
from paceline.methods.packed import by_depth

if TYPE_CHECKING:
    from paceline.methods.dflash.model import DFlashDraft


def block_loss(draft: DFlashDraft, batch: DFlashBatch) -> LossSums:
    """Sum over anchors and depths of weight times loss, and of the head's further terms.

    `num_tokens` counts the anchors. Metrics, per depth less 1: `loss_k` summed over `count_k` guesses,
    `hits_k` of `judged_k` that are the target's own choice; and `chain`, the summed number of leading hits
    of all anchors. A guess of a head that reads tokens before it is judged after the sample's own tokens.
    """
    context = draft.context(batch.aux_hidden_states, batch.positions)
    hidden = draft.places(batch.tokens, batch.places, context, attention_over(batch.layout))
    latents, _ = draft.head.latents(Places(hidden, batch.previous.T, draft.embed))
    sums: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []
    for group in batch.groups:
        parts = (
            draft,
            hidden[group.anchors].transpose(0, 1),
            None if latents is None else latents[group.anchors].transpose(0, 1),
            batch.last_hidden_states[batch.rows[group.targets]],
            batch.picked[:, group.anchors],
            batch.counted[:, group.anchors],
        )
        if draft.section.recompute or len(batch.groups) > 1:
            part = checkpoint(_group_loss, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            part = _group_loss(*parts)
        for kept, value in zip((sums, losses, hits), part, strict=True):
            kept.append(value)
    if not sums:  # nothing to predict: a loss of 0 that still runs backward
        sums, losses, hits = [hidden.sum(dtype=torch.float32)], [batch.counted], [batch.counted]
    counted, hit = batch.counted.sum(1), torch.cat(hits, 1)
    metrics = {
        **by_depth("loss", torch.cat(losses, 1).sum(1)),
        **by_depth("count", counted),
        **by_depth("hits", hit.sum(1)),
        **by_depth("judged", counted),
        "chain": hit.cumprod(0).sum(),
    }
    return LossSums(torch.stack(sums).sum(), batch.num_tokens, metrics)


def _group_loss(
    draft: DFlashDraft,
    hidden: torch.Tensor,
    latents: torch.Tensor | None,
    states: torch.Tensor,
    picked: torch.Tensor,
    counted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weighted sum [], loss float32 [D, a], hits float32 [D, a]) of guesses from `hidden` [D, a, H].

    `latents` [D, a, r]; `states` [m, H] are the target's, `picked` and `counted` [D, a] as in the batch.
    """
    head, depths = draft.head, hidden.shape[0]
    with torch.no_grad():
        wanted = draft.target_output(states)
    picked, hidden = picked.flatten(), hidden.flatten(0, 1)
    latents = None if latents is None else latents.flatten(0, 1)
    base = draft.base_logits(hidden)
    logits = head.trained(base, latents)
    with torch.no_grad():
        choices = wanted.argmax(-1)[picked]
        hits = (head.logits(base, latents).argmax(-1) == choices).view_as(counted) * counted
        weights = _weights(draft.section.weighting, logits, choices, counted).flatten()
    total, losses = distribution_loss(draft.section.loss, logits, wanted, picked, weights)
    more = head.more_loss(Rows(hidden, base, latents, logits, wanted, picked, weights))
    return total if more is None else total + more, losses.view(depths, -1) * counted, hits


def _weights(
    weighting: WeightingSection, logits: torch.Tensor, choices: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """float32 [D, a]: what each guess weighs; 0 where it does not count. See `WeightingSection`."""
    if weighting.name == "decay":
        depths = torch.arange(counted.shape[0], device=counted.device)
        return counted * (-depths / weighting.gamma).exp()[:, None]
    scores = logits.float()
    log_probability = scores.gather(-1, choices[:, None])[:, 0] - scores.logsumexp(-1)
    return dpace_weights(log_probability.view_as(counted).exp(), counted, weighting.alpha)


def dpace_weights(probability: torch.Tensor, counted: torch.Tensor, alpha: float) -> torch.Tensor:
    """float32 [D, a] (arXiv 2605.18810): from each depth on, the products of smoothed `probability` [D, a]
    up to each depth, added up. Guesses that do not count change no product and weigh 0."""
    smoothed = torch.where(counted > 0, (1.0 - alpha) * probability + alpha, 1.0)
    reached = smoothed.cumprod(0) * counted
    return reached.flip(0).cumsum(0).flip(0) * counted
