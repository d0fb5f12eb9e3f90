"""Training-time test: the loss of an EAGLE-3 draft unrolled over its own outputs (arXiv 2503.01840).

An *anchor* is a row i whose first prediction, token i+2, belongs to the answer. Step k feeds row i
the embedding of token i+1+k and predicts token i+2+k; its feature is the fused target state at
k = 0 and the output of step k-1 afterwards. Queries of step k attend to the keys that target
features gave (rows <= i, step 0) and to row i's own keys of steps 1..k, which is exactly what a
decoder sees that has drafted k tokens after token i+1.

Only anchors are queried, and lm_head runs only where a prediction counts: prompts cost keys and
values but nothing else. Nothing is padded: the rows of all samples lie one after another, and only
attention goes through them sample by sample. Legend: R rows of all samples, A anchors of all
samples, M counted rows, N heads, d head_dim, H hidden, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch.utils.checkpoint import checkpoint

from paceline.methods.eagle3.attention import KeyValue, Span, attend, spans
from paceline.methods.eagle3.cross_entropy import soft_cross_entropy
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.methods.eagle3.targets import counted_rows
from paceline.methods.method import LossSums


@dataclass(frozen=True)
class Eagle3Batch:
    """Packed samples. A row is a token that the target processed, of each sample all but its last."""

    following: torch.Tensor  # int64 [R]: the token after each row
    aux_hidden_states: torch.Tensor  # target dtype [R, 3H]
    last_hidden_states: torch.Tensor  # target dtype [M0, H], pre-norm: of the M0 counted rows only
    counted: torch.Tensor  # bool [R]: the token *after* row j belongs to the answer
    positions: torch.Tensor  # int64 [R]: of the row in its sample
    anchors: torch.Tensor  # int64 [A]: rows, ascending
    ends: torch.Tensor  # int64 [A]: the first row beyond the anchor's sample
    lengths: tuple[int, ...]  # rows of each sample
    widths: tuple[int, ...]  # anchors of each sample

    def to(self, device: torch.device) -> Eagle3Batch:
        """The batch on `device`; to a CUDA device the copies run beside what the device does."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        if device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return Eagle3Batch(**{**values, **moved})


def collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> Eagle3Batch:
    """Pack samples (input_ids, loss_mask, aux_ and last_hidden_states) into one batch on the CPU."""
    lengths = tuple(int(sample["input_ids"].numel()) - 1 for sample in samples)
    counted = [counted_rows(sample["loss_mask"]) for sample in samples]
    # Row i is an anchor if row i+1, whose target distribution it predicts, counts.
    anchors = [rows[1:].nonzero().squeeze(1) for rows in counted]
    widths = tuple(rows.numel() for rows in anchors)
    ends = torch.tensor(lengths).cumsum(0)
    starts = (ends - torch.tensor(lengths)).tolist()
    return Eagle3Batch(
        torch.cat([sample["input_ids"][1:] for sample in samples]).long(),
        torch.cat([sample["aux_hidden_states"] for sample in samples]),
        torch.cat([sample["last_hidden_states"] for sample in samples]),
        torch.cat(counted),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.cat([rows + start for rows, start in zip(anchors, starts, strict=True)]),
        ends.repeat_interleave(torch.tensor(widths)),
        lengths,
        widths,
    )


@dataclass
class _Targets:
    """Target distribution over the draft vocabulary for every counted row, computed once."""

    probabilities: torch.Tensor  # float32 [M0, D]
    top: torch.Tensor  # int64 [M0]
    row_of: torch.Tensor  # int64 [R] -> index into the M0 rows
    reachable: torch.Tensor  # bool [R]: the token that follows can be drafted


def _targets(draft: Eagle3Draft, batch: Eagle3Batch) -> _Targets:
    with torch.no_grad():
        logits = draft.target_output(batch.last_hidden_states)
        row_of = batch.counted.cumsum(0) - 1
        return _Targets(logits.softmax(-1), logits.argmax(-1), row_of, draft.t2d[batch.following])


def _deeper(
    draft: Eagle3Draft,
    feature: torch.Tensor,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    keys: KeyValue,
    own: tuple[KeyValue, ...],
    samples: Sequence[Span],
    step: int,
) -> tuple[torch.Tensor, tuple[KeyValue, ...]]:
    """Step `step` of the anchors: output [A, H], and `own` with the step's pair, which step 0 has not.

    `feature` [A, H], `token_ids` and `positions` int64 [A]; the others as in `attend`.
    """
    layer = draft.midlayer
    inputs = layer.inputs(draft.embed(token_ids), feature)[None]
    if step:
        own = (*own, layer.self_attn.key_value(inputs, positions[None]))
    mixed = attend(layer.self_attn.query(inputs, positions[None]), keys, own, samples)
    return layer.finish(feature[None], mixed)[0], own


def training_time_test(
    draft: Eagle3Draft, batch: Eagle3Batch, ttt_steps: int, step_decay: float, recompute: bool = False
) -> LossSums:
    """Sum over anchors and steps of step_decay**k times the cross entropy to the target.

    `num_tokens` counts the anchors. Metrics, per step k: `loss_k`, `hits_k` (draft argmax equals the
    target's argmax over the draft vocabulary, and the token that follows can be drafted), `count_k`;
    and `chain`, the summed number of leading hits, whose mean plus 1 estimates the acceptance length.
    With `recompute` backward computes every step's layer again, to the same bits, instead of keeping it.
    """
    layer, anchors = draft.midlayer, batch.anchors
    places, final = batch.positions[anchors], batch.ends - 1
    fused = draft.fc(batch.aux_hidden_states.to(draft.fc.weight.dtype))
    inputs = layer.inputs(draft.embed(batch.following), fused)
    keys = layer.self_attn.key_value(inputs[None], batch.positions[None])
    samples = spans(batch.positions, places, batch.lengths, batch.widths)
    feature = fused[anchors]
    own: tuple[KeyValue, ...] = ()
    outputs: list[torch.Tensor] = []
    predicts: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []

    for step in range(ttt_steps):
        # The row of the token that is fed now, which is also the row whose successor is predicted.
        predicted = torch.minimum(anchors + step + 1, final)
        parts = draft, feature, batch.following[predicted - 1], places + step, keys, own, samples, step
        if recompute:  # nothing in the layer draws random numbers
            feature, own = checkpoint(_deeper, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            feature, own = _deeper(*parts)
        is_counted = (anchors + step < final) & batch.counted[predicted]
        outputs.append(feature[is_counted])
        predicts.append(predicted[is_counted])
        counts.append(is_counted)
    return _sums(draft, batch, outputs, predicts, counts, step_decay)


def _sums(
    draft: Eagle3Draft,
    batch: Eagle3Batch,
    outputs: Sequence[torch.Tensor],
    predicts: Sequence[torch.Tensor],
    counts: Sequence[torch.Tensor],
    step_decay: float,
) -> LossSums:
    """Loss and metrics of every step's counted `outputs` [M_k, H], which predict rows `predicts` [M_k].

    `counts` bool [A] marks the anchors that they belong to.
    """
    targets, sizes = _targets(draft, batch), [output.shape[0] for output in outputs]
    rows = torch.cat(list(predicts))
    scale = torch.cat(
        [rows.new_full((size,), step_decay**step, dtype=torch.float32) for step, size in enumerate(sizes)]
    )
    loss_sum, losses, hits = soft_cross_entropy(
        draft.norm(torch.cat(list(outputs))),
        draft.lm_head.weight,
        targets.probabilities,
        targets.top,
        targets.row_of[rows],
        scale,
    )
    hits &= targets.reachable[rows]
    metrics: dict[str, torch.Tensor] = {}
    leading = torch.ones_like(batch.anchors, dtype=torch.bool)
    chain = leading.new_zeros((), dtype=torch.int64)
    parts = zip(counts, losses.split(sizes), hits.split(sizes), strict=True)
    for step, (is_counted, step_losses, step_hits) in enumerate(parts):
        hit = torch.zeros_like(is_counted)
        hit[is_counted] = step_hits
        leading = leading & hit
        chain = chain + leading.sum()
        metrics[f"loss_{step}"] = step_losses.sum()
        metrics[f"hits_{step}"] = step_hits.sum()
        metrics[f"count_{step}"] = is_counted.sum()
    metrics["chain"] = chain
    return LossSums(loss_sum, sum(batch.widths), metrics)
