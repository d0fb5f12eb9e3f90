"""Training-time test: the loss of an EAGLE-3 draft unrolled over its own outputs (arXiv 2503.01840).

An *anchor* is a row i whose first prediction, token i+2, belongs to the answer. Step k feeds row i
the embedding of token i+1+k and predicts token i+2+k; its feature is the fused target state at
k = 0 and the output of step k-1 afterwards. Queries of step k attend to the keys that target
features gave (rows <= i, step 0) and to row i's own keys of steps 1..k, which is exactly what a
decoder sees that has drafted k tokens after token i+1.

Only anchors are queried, and lm_head runs only where a prediction counts, so padding and prompts
cost keys and values but nothing else. Legend: B batch, L length, A anchors, M counted rows,
N heads, d head_dim, H hidden, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.methods.eagle3.cross_entropy import soft_cross_entropy
from paceline.methods.eagle3.model import Eagle3Draft, rms_norm
from paceline.methods.method import LossSums


@dataclass(frozen=True)
class Eagle3Batch:
    """Padded samples. T of a sample counts the tokens the target processed: its last one is absent."""

    input_ids: torch.Tensor  # int64 [B, L]
    aux_hidden_states: torch.Tensor  # target dtype [B, L, 3H]
    last_hidden_states: torch.Tensor  # target dtype [B, L, H], pre-norm
    counted: torch.Tensor  # bool [B, L]: the token *after* row j belongs to the answer
    anchors: torch.Tensor  # int64 [B, A], padded with 0
    anchor_valid: torch.Tensor  # bool [B, A]
    num_anchors: int  # the valid ones

    def to(self, device: torch.device) -> Eagle3Batch:
        """The batch on `device`; to a CUDA device the copies run beside what the device does."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_anchors"}
        if device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return Eagle3Batch(**moved, num_anchors=self.num_anchors)


def collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> Eagle3Batch:
    """Pad samples (input_ids, loss_mask, aux_hidden_states, last_hidden_states) into one batch on the CPU."""
    size, length = len(samples), max(int(s["input_ids"].numel()) for s in samples)
    first = samples[0]
    input_ids = torch.zeros(size, length, dtype=torch.int64)
    aux = first["aux_hidden_states"].new_zeros(size, length, first["aux_hidden_states"].shape[-1])
    last = first["last_hidden_states"].new_zeros(size, length, first["last_hidden_states"].shape[-1])
    counted = torch.zeros(size, length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        tokens = int(sample["input_ids"].numel())
        input_ids[row, :tokens] = sample["input_ids"]
        aux[row, :tokens] = sample["aux_hidden_states"]
        last[row, :tokens] = sample["last_hidden_states"]
        counted[row, : tokens - 1] = sample["loss_mask"][1:].bool()
        # The token after the last row was generated but never processed: always an answer token.
        counted[row, tokens - 1] = True
    # Row i is an anchor if row i+1, whose target distribution it predicts, counts.
    is_anchor = F.pad(counted[:, 1:], (0, 1))
    width = max(1, int(is_anchor.sum(1).max()))
    anchors = torch.argsort(is_anchor.to(torch.uint8), dim=1, descending=True, stable=True)[:, :width]
    valid = is_anchor.gather(1, anchors)
    return Eagle3Batch(input_ids, aux, last, counted, anchors.masked_fill(~valid, 0), valid, int(valid.sum()))


@dataclass
class _Targets:
    """Target distribution over the draft vocabulary for every counted row, computed once."""

    probabilities: torch.Tensor  # float32 [M0, D]
    top: torch.Tensor  # int64 [M0]
    row_of: torch.Tensor  # int64 [B, L] -> index into the M0 rows
    reachable: torch.Tensor = field(repr=False)  # bool [M0]: the token that follows can be drafted


def _targets(draft: Eagle3Draft, batch: Eagle3Batch) -> _Targets:
    counted = batch.counted
    with torch.no_grad():
        last = batch.last_hidden_states[counted]
        normed = rms_norm(last, draft.target_norm, draft.config.rms_norm_eps)
        logits = F.linear(normed.to(draft.target_rows.dtype), draft.target_rows).float()
        following = F.pad(batch.input_ids[:, 1:], (0, 1))
        known = F.pad(batch.counted[:, 1:], (0, 1))[counted]  # the sample's last token is not in the batch
        reachable = draft.t2d[following[counted]] | ~known
        row_of = torch.zeros_like(batch.input_ids)
        row_of[counted] = torch.arange(last.shape[0], device=last.device)
        return _Targets(logits.softmax(-1), logits.argmax(-1), row_of, reachable)


def _attend(
    query: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    own: list[tuple[torch.Tensor, torch.Tensor]],
    hidden_mask: torch.Tensor,
) -> torch.Tensor:
    """Attention of anchors over step-0 keys and their own later keys; [B, N, A, d].

    `query` [B, N, A, d]; `keys` = step-0 (keys, values) [B, N_kv, L, d]; `own` = one (key, value)
    pair [B, N_kv, A, d] per step 1..k; `hidden_mask` bool [B, 1, 1, A, L], True where row > anchor.
    """
    kv_heads = keys[0].shape[1]
    size, heads, width, head_dim = query.shape
    grouped = query.view(size, kv_heads, heads // kv_heads, width, head_dim) * head_dim**-0.5
    scores = grouped @ keys[0].unsqueeze(2).transpose(-1, -2)
    scores = scores.float().masked_fill(hidden_mask, float("-inf"))
    diagonal = [(grouped * key.unsqueeze(2)).sum(-1, keepdim=True).float() for key, _ in own]
    weights = torch.cat([scores, *diagonal], dim=-1).softmax(-1).to(query.dtype)
    length = keys[0].shape[2]
    mixed = weights[..., :length] @ keys[1].unsqueeze(2)
    for step, (_, value) in enumerate(own):
        mixed = mixed + weights[..., length + step, None] * value.unsqueeze(2)
    return mixed.flatten(1, 2)


def training_time_test(draft: Eagle3Draft, batch: Eagle3Batch, ttt_steps: int, step_decay: float) -> LossSums:
    """Sum over anchors and steps of step_decay**k times the cross entropy to the target.

    `num_tokens` counts the anchors. Metrics, per step k: `loss_k`, `hits_k` (draft argmax equals the
    target's argmax over the draft vocabulary, and the token that follows can be drafted), `count_k`;
    and `chain`, the summed number of leading hits, whose mean plus 1 estimates the acceptance length.
    """
    layer, targets = draft.midlayer, _targets(draft, batch)
    size, length = batch.input_ids.shape
    anchors, valid = batch.anchors, batch.anchor_valid
    device = batch.input_ids.device
    rows = torch.arange(size, device=device).unsqueeze(1)
    positions = torch.arange(length, device=device).expand(size, length)
    hidden_mask = (positions[:, None, :] > anchors[:, :, None])[:, None, None]

    fused = draft.fc(batch.aux_hidden_states.to(draft.fc.weight.dtype))
    inputs = layer.inputs(draft.embed(F.pad(batch.input_ids[:, 1:], (0, 1))), fused)
    keys = layer.self_attn.key_value(inputs, positions)
    feature, inputs = fused[rows, anchors], inputs[rows, anchors]
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    loss_sum = fused.new_zeros((), dtype=torch.float32)
    metrics: dict[str, torch.Tensor] = {}
    leading = valid.clone()
    chain = leading.new_zeros((), dtype=torch.int64)

    for step in range(ttt_steps):
        at = (anchors + step).clamp(max=length - 1)  # the clamp only touches rows that cannot count
        if step:
            following = batch.input_ids[rows, (at + 1).clamp(max=length - 1)]
            inputs = layer.inputs(draft.embed(following), feature)
            own.append(layer.self_attn.key_value(inputs, anchors + step))
        query = layer.self_attn.query(inputs, anchors + step)
        feature = layer.finish(feature, _attend(query, keys, own, hidden_mask))

        predicts = anchors + step + 1
        counts = valid & (predicts < length)
        predicts = predicts.clamp(max=length - 1)
        counts = counts & batch.counted[rows, predicts]
        picked = targets.row_of[rows, predicts][counts]
        step_loss, hits = _step_loss(draft, feature[counts], targets, picked)
        loss_sum = loss_sum + step_decay**step * step_loss

        hit = torch.zeros_like(counts)
        hit[counts] = hits
        leading = leading & hit
        chain = chain + leading.sum()
        metrics[f"loss_{step}"] = step_loss.detach()
        metrics[f"hits_{step}"] = hits.sum()
        metrics[f"count_{step}"] = counts.sum()
    metrics["chain"] = chain
    return LossSums(loss_sum, batch.num_anchors, metrics)


def _step_loss(
    draft: Eagle3Draft, hidden: torch.Tensor, targets: _Targets, picked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed soft cross entropy [], hits bool [M]) of layer outputs `hidden` [M, H]."""
    loss, top = soft_cross_entropy(draft.norm(hidden), draft.lm_head.weight, targets.probabilities, picked)
    hits = (top == targets.top[picked]) & targets.reachable[picked]
    return loss, hits
