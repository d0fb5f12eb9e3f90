"""Training-time test: the loss of an EAGLE-3 draft unrolled over its own outputs (arXiv 2503.01840).

An *anchor* is a row i whose first prediction, token i+2, belongs to the answer. Step k feeds row i
the embedding of token i+1+k and predicts token i+2+k; its feature is the fused target state at
k = 0 and the output of step k-1 afterwards. Queries of step k attend to the keys that target
features gave (rows <= i, step 0) and to row i's own keys of steps 1..k, which is exactly what a
decoder sees that has drafted k tokens after token i+1.

Samples lie one after another without padding, so that the linear layers compute nothing in vain: only
anchors are queried, lm_head runs only where a prediction counts. Attention alone is computed on a padded
grid, a row for each sample, where it costs little. Legend: B samples, T tokens in all, L of the longest
sample, M anchors in all, A of the sample with most, N heads, d head_dim, H hidden, D draft vocabulary.
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
    """Samples one after another. A sample counts the tokens that the target processed: its last is absent."""

    input_ids: torch.Tensor  # int64 [T]
    next_ids: torch.Tensor  # int64 [T]: the token that follows in the sample; 0 behind its last
    aux_hidden_states: torch.Tensor  # target dtype [T, 3H]
    last_hidden_states: torch.Tensor  # target dtype [T, H], pre-norm
    counted: torch.Tensor  # bool [T]: the token *after* this one belongs to the answer
    next_counted: torch.Tensor  # bool [T]: `counted` of the token that follows; False behind the last
    positions: torch.Tensor  # int64 [T], from 0 in every sample
    cells: torch.Tensor  # int64 [T]: the token's place in a [B, L] grid
    anchors: torch.Tensor  # int64 [M], of T
    anchor_cells: torch.Tensor  # int64 [M]: the anchor's place in a [B, A] grid
    ends: torch.Tensor  # int64 [M]: the last token, of T, of the anchor's sample
    grid: tuple[int, int, int]  # B, L, A

    def to(self, device: torch.device) -> Eagle3Batch:
        """The batch on `device`; to a CUDA device the copies run beside what the device does."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "grid"}
        if device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return Eagle3Batch(**moved, grid=self.grid)


def collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> Eagle3Batch:
    """Join samples (input_ids, loss_mask, aux_hidden_states, last_hidden_states) into a batch on the CPU."""
    lengths = torch.tensor([sample["input_ids"].numel() for sample in samples])
    stops = lengths.cumsum(0)
    num_tokens, longest = int(stops[-1]), int(lengths.max())
    sample_of = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    positions = torch.arange(num_tokens) - (stops - lengths)[sample_of]
    is_last = torch.zeros(num_tokens, dtype=torch.bool)
    is_last[stops - 1] = True

    def following(values: torch.Tensor) -> torch.Tensor:
        return F.pad(values[1:], (0, 1)).masked_fill(is_last, 0)

    input_ids = torch.cat([sample["input_ids"] for sample in samples]).long()
    # The token after a sample's last was generated but never processed: always an answer token.
    counted = following(torch.cat([sample["loss_mask"] for sample in samples]).bool()) | is_last
    # A row is an anchor if the next one, whose target distribution it predicts, counts.
    next_counted = following(counted)
    anchors = next_counted.nonzero()[:, 0]
    anchors_of = torch.bincount(sample_of[anchors], minlength=len(samples))
    width = max(1, int(anchors_of.max()))
    before = (anchors_of.cumsum(0) - anchors_of)[sample_of[anchors]]
    return Eagle3Batch(
        input_ids=input_ids,
        next_ids=following(input_ids),
        aux_hidden_states=torch.cat([sample["aux_hidden_states"] for sample in samples]),
        last_hidden_states=torch.cat([sample["last_hidden_states"] for sample in samples]),
        counted=counted,
        next_counted=next_counted,
        positions=positions,
        cells=sample_of * longest + positions,
        anchors=anchors,
        anchor_cells=sample_of[anchors] * width + torch.arange(anchors.numel()) - before,
        ends=(stops - 1)[sample_of[anchors]],
        grid=(len(samples), longest, width),
    )


@dataclass
class _Targets:
    """Target distribution over the draft vocabulary for every counted row, computed once."""

    probabilities: torch.Tensor  # float32 [M0, D]
    top: torch.Tensor  # int64 [M0]
    row_of: torch.Tensor  # int64 [T] -> index into the M0 rows
    reachable: torch.Tensor = field(repr=False)  # bool [M0]: the token that follows can be drafted


def _targets(draft: Eagle3Draft, batch: Eagle3Batch) -> _Targets:
    counted = batch.counted
    with torch.no_grad():
        last = batch.last_hidden_states[counted]
        normed = rms_norm(last, draft.target_norm, draft.config.rms_norm_eps)
        logits = F.linear(normed.to(draft.target_rows.dtype), draft.target_rows).float()
        # What follows a sample's last token is not in the batch.
        reachable = draft.t2d[batch.next_ids[counted]] | ~batch.next_counted[counted]
        row_of = torch.zeros_like(batch.input_ids)
        row_of[counted] = torch.arange(last.shape[0], device=last.device)
        return _Targets(logits.softmax(-1), logits.argmax(-1), row_of, reachable)


def _on_grid(states: torch.Tensor, cells: torch.Tensor, size: int, width: int) -> torch.Tensor:
    """`states` [1, N, M, d] at their `cells` [M] of a grid [size, N, width, d], zeros elsewhere."""
    rows = states[0].transpose(0, 1)
    grid = rows.new_zeros(size * width, *rows.shape[1:]).index_copy(0, cells, rows)
    return grid.view(size, width, *rows.shape[1:]).transpose(1, 2)


def _off_grid(grid: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """The inverse of `_on_grid`."""
    return grid.transpose(1, 2).flatten(0, 1)[cells].transpose(0, 1).unsqueeze(0)


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
    attention, anchors, cells = layer.self_attn, batch.anchors, batch.anchor_cells
    size, length, width = batch.grid
    at = batch.positions[anchors]
    row_at = at.new_zeros(size * width).index_copy(0, cells, at).view(size, 1, 1, width, 1)
    hidden_mask = torch.arange(length, device=at.device) > row_at

    fused = draft.fc(batch.aux_hidden_states.to(draft.fc.weight.dtype)).unsqueeze(0)
    inputs = layer.inputs(draft.embed(batch.next_ids).unsqueeze(0), fused)
    key, value = attention.key_value(inputs, batch.positions.unsqueeze(0))
    keys = _on_grid(key, batch.cells, size, length), _on_grid(value, batch.cells, size, length)
    feature, inputs = fused[:, anchors], inputs[:, anchors]
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    loss_sum = fused.new_zeros((), dtype=torch.float32)
    metrics: dict[str, torch.Tensor] = {}
    leading = torch.ones_like(anchors, dtype=torch.bool)
    chain = anchors.new_zeros(())

    for step in range(ttt_steps):
        position = (at + step).unsqueeze(0)
        if step:
            # Behind a sample's end there is no token; what stands in for it cannot count.
            following = batch.input_ids[torch.minimum(anchors + step + 1, batch.ends)]
            inputs = layer.inputs(draft.embed(following).unsqueeze(0), feature)
            key, value = attention.key_value(inputs, position)
            own.append((_on_grid(key, cells, size, width), _on_grid(value, cells, size, width)))
        query = _on_grid(attention.query(inputs, position), cells, size, width)
        feature = layer.finish(feature, _off_grid(_attend(query, keys, own, hidden_mask), cells))

        predicts = anchors + step + 1
        counts = predicts <= batch.ends
        predicts = torch.minimum(predicts, batch.ends)
        counts = counts & batch.counted[predicts]
        step_loss, hits = _step_loss(draft, feature[0, counts], targets, targets.row_of[predicts[counts]])
        loss_sum = loss_sum + step_decay**step * step_loss

        hit = torch.zeros_like(counts)
        hit[counts] = hits
        leading = leading & hit
        chain = chain + leading.sum()
        metrics[f"loss_{step}"] = step_loss.detach()
        metrics[f"hits_{step}"] = hits.sum()
        metrics[f"count_{step}"] = counts.sum()
    metrics["chain"] = chain
    return LossSums(loss_sum, anchors.numel(), metrics)


def _step_loss(
    draft: Eagle3Draft, hidden: torch.Tensor, targets: _Targets, picked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed soft cross entropy [], hits bool [M]) of layer outputs `hidden` [M, H]."""
    loss, top = soft_cross_entropy(draft.norm(hidden), draft.lm_head.weight, targets.probabilities, picked)
    hits = (top == targets.top[picked]) & targets.reachable[picked]
    return loss, hits
