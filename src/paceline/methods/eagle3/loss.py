"""Training-time test: the loss of an EAGLE-3 draft unrolled over its own outputs (arXiv 2503.01840).

Step k of an anchor (see batch.py) is fed the embedding of token i+1+k; its feature is the
fused target state at k = 0 and the output of step k-1 afterwards. Queries of step k attend to the keys
from target features (rows <= i, step 0) and to row i's own keys of steps 1..k, which is exactly what a
decoder sees after it has drafted k tokens after token i+1. A parallel draft (parallel.py) reads one learned
row instead at every k > 0.

Only anchors have queries: prompts cost keys and values and nothing else. Nothing is padded: the rows of all
samples are concatenated, and only attention treats samples one by one. No operation here makes the host wait
for the device.

Legend: R rows, A anchors, S steps, M target rows, N heads, d head_dim, H hidden, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from paceline.methods.eagle3.attention import KeyValue, Layout, attend
from paceline.methods.eagle3.batch import Eagle3Batch
from paceline.methods.losses.distribution import distribution_loss
from paceline.methods.method import LossSums
from paceline.methods.packed import by_depth

if TYPE_CHECKING:
    from paceline.methods.eagle3.model import Eagle3Draft


def training_time_test(draft: Eagle3Draft, batch: Eagle3Batch, recompute: bool = False) -> LossSums:
    """Sum over anchors and steps of `scale` (step_decay**k) times the draft's loss against the target.

    `num_tokens` counts the anchors. Metrics, per step k: `loss_k` summed over `count_k` predictions;
    `hits_k` of `judged_k` judged ones are the target's own choice; and `chain`, the summed number of
    leading hits of the `judged_0` judged anchors, whose mean plus 1 estimates the acceptance length.
    With `recompute` backward computes layers and logits again, to the same bits, instead of keeping them.
    """
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    fused = draft.fuse(batch.aux_hidden_states)
    # No anchor attends to a sample's last row, because the state after it is not captured.
    inputs = layer.inputs(draft.embed(batch.following), fused)
    keys = attention.key_value(inputs[None], batch.positions[None])
    layout = batch.layout
    feature = fused[batch.anchors]
    own: tuple[KeyValue, ...] = ()
    outputs: list[torch.Tensor] = []
    for step in range(batch.fed.shape[0]):
        token_ids = batch.fed[step]
        if step:
            feature, token_ids = draft.deeper_inputs(outputs[-1], token_ids)
        parts = draft, feature, token_ids, batch.places + step, keys, own, layout, step
        if recompute:  # nothing in the layer draws random numbers
            output, own = checkpoint(_deeper, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            output, own = _deeper(*parts)
        outputs.append(output)
    loss_sum, losses = _losses(draft, batch, outputs, recompute)
    counted = batch.scale > 0
    metrics = {
        **by_depth("loss", (losses * counted).sum(1)),
        **by_depth("count", counted.sum(1)),
        # After the loss, because autocast caches the first cast of a weight, here one with gradients.
        **_acceptance(draft, batch, outputs),
    }
    return LossSums(loss_sum, batch.num_tokens, metrics)


def _deeper(
    draft: Eagle3Draft,
    feature: torch.Tensor,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    keys: KeyValue,
    own: tuple[KeyValue, ...],
    layout: Layout,
    step: int,
) -> tuple[torch.Tensor, tuple[KeyValue, ...]]:
    """Step `step` of the anchors: output [A, H], and `own` with the step's pair appended (except at step 0).

    `feature` is [A, H], `token_ids` and `positions` int64 [A]; the first two may be one row for all anchors.
    The others are as in `attend`.
    """
    layer = draft.midlayer
    inputs = layer.inputs(draft.embed(token_ids), feature)[None]
    if step:
        key, value = layer.self_attn.key_value(inputs, positions[None])
        own = (*own, (key, value.expand_as(key)))
    mixed = attend(layer.self_attn.query(inputs, positions[None]), keys, own, layout)
    return layer.finish(feature[None], mixed)[0], own


def _losses(
    draft: Eagle3Draft, batch: Eagle3Batch, outputs: Sequence[torch.Tensor], recompute: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss sum [], each prediction's loss float32 [S, A]) of the steps' `outputs`, S times [A, H].

    A single group keeps the gradient of its logits. With several groups, or with `recompute`, backward
    computes each group's logits again, so memory of the order of D does not grow with anchors or steps.
    """
    sums, losses = [], []
    for group in batch.groups:
        rows = torch.stack([output[group.anchors] for output in outputs])
        parts = (
            draft,
            rows,
            batch.last_hidden_states[group.targets],
            batch.picked[:, group.anchors] - group.targets.start,
            batch.scale[:, group.anchors],
        )
        if recompute or len(batch.groups) > 1:
            part = checkpoint(_group_loss, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            part = _group_loss(*parts)
        sums.append(part[0])
        losses.append(part[1])
    if not sums:  # nothing to predict: a loss of 0 that still runs backward
        return torch.stack(list(outputs)).sum(dtype=torch.float32), batch.scale
    return torch.stack(sums).sum(), torch.cat(losses, 1)


def _group_loss(
    draft: Eagle3Draft,
    outputs: torch.Tensor,
    states: torch.Tensor,
    picked: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_losses`, for one group: `outputs` [S, a, H] are compared with the target's `states` [m, H]."""
    with torch.no_grad():
        wanted = draft.target_output(states)
    # Predictions that do not count pick an arbitrary row of the group and have weight 0.
    picked = picked.clamp(min=0).flatten()
    logits = draft.logits(outputs.flatten(0, 1))
    total, losses = distribution_loss(draft.loss, logits, wanted, picked, scale.flatten())
    return total, losses.view_as(scale)


@torch.no_grad()
def _acceptance(
    draft: Eagle3Draft, batch: Eagle3Batch, outputs: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Metrics of the guesses that greedy decoding would accept, over the judged anchors.

    A guess is a hit if it is the target's argmax over its whole vocabulary. If the argmax is outside the
    draft vocabulary, no guess can be a hit.
    """
    choices = draft.target_choices(batch.last_hidden_states[batch.judged_rows]).argmax(-1)
    judged = torch.stack([output[batch.judged] for output in outputs])
    guesses = draft.target_ids()[draft.logits(judged).argmax(-1)]  # [S, J]
    counted = batch.scale[:, batch.judged] > 0
    hits = (guesses == choices[batch.judged_picks]) & counted
    return {
        **by_depth("hits", hits.sum(1)),
        **by_depth("judged", counted.sum(1)),
        "chain": hits.cumprod(0).sum(),
    }
