"""Attention of an unrolled step that keeps no scores for backward.

A query of step k attends to the keys from target features (rows up to its own, step 0) and to its own
row's keys of steps 1..k; a window hides rows that lie further back. Plain autograd keeps the weights of every
step, a x T per sample and head, several times over. This function keeps only queries, keys, values, the
output and one log-sum-exp per query; backward computes the scores again, as FlashAttention does (arXiv
2205.14135, algorithm 4), tile by tile. A tile is some neighbouring anchors of one sample and the rows that
they can see, so scores take memory of the order of T, not a x T, and no score outside the tile is computed.

Legend: R rows of all samples, A anchors of all samples, T and a rows and anchors of one tile, N query
heads, N_kv key-value heads, G = N / N_kv, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]

TILE_ANCHORS = 256


@dataclass(frozen=True)
class Tile:
    """Neighbouring anchors of one sample and the rows that they can see, as slices on the host."""

    anchors: slice  # of the A
    rows: slice  # of the R


@dataclass(frozen=True)
class Layout:
    """Which keys each anchor may see: those of its tile whose position is not after its own."""

    positions: torch.Tensor  # int64 [R]: of the row in its sample
    places: torch.Tensor  # int64 [A]: the same of the anchor's row
    tiles: tuple[Tile, ...]
    window: int | None = None  # a row sees itself and the `window` - 1 rows before it

    def hidden(self, tile: Tile, step: int) -> torch.Tensor:
        """Bool [a, T], True where the row comes after the anchor, or lies too far before its step `step`."""
        rows, places = self.positions[tile.rows], self.places[tile.anchors, None]
        later = rows > places
        return later if self.window is None else later | (rows <= places + (step - self.window))


def tiles_of(
    anchors: Sequence[torch.Tensor], lengths: Sequence[int], window: int | None = None
) -> tuple[Tile, ...]:
    """The tiles of samples with these `lengths`, whose anchors' rows int64 [a] ascend in each sample."""
    tiles, row, anchor = [], 0, 0
    for places, length in zip(anchors, lengths, strict=True):
        for part in places.split(TILE_ANCHORS) if places.numel() else ():
            last = anchor + part.numel()
            first = 0 if window is None else max(0, int(part[0]) + 1 - window)
            tiles.append(Tile(slice(anchor, last), slice(row + first, row + int(part[-1]) + 1)))
            anchor = last
        row += length
    return tuple(tiles)


class UnrolledAttention(torch.autograd.Function):
    """Use `attend`; this class only carries the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *own: torch.Tensor,
    ) -> torch.Tensor:
        grouped = _grouped(query, keys) * query.shape[-1] ** -0.5
        # Laid out anchor by anchor, so that the output projection uses this memory without a copy.
        packed = query.new_empty(query.shape[2], query.shape[1], query.shape[3], dtype=torch.float32)
        mixed = _grouped(packed.transpose(0, 1)[None], keys)
        log_total = grouped.new_empty(grouped.shape[:3], dtype=torch.float32)
        for tile in layout.tiles:
            scores = _scores(grouped, keys, tile, layout, len(own) // 2)
            weights = scores.softmax(-1)
            # The likeliest row's weight is exp(highest score - log of the sum of exponentials).
            log_total[:, :, tile.anchors] = scores.amax(-1) - weights.amax(-1).log()
            part = weights.to(values.dtype).flatten(1, 2) @ values[0, :, tile.rows]
            mixed[:, :, tile.anchors] = part.float().view_as(mixed[:, :, tile.anchors])
        if own:
            of_own = torch.stack([_own_scores(grouped, key) for key in own[0::2]])
            among_rows, log_total = log_total, torch.logsumexp(torch.cat([log_total[None], of_own]), 0)
            mixed *= (among_rows - log_total).exp_().unsqueeze(-1)
            for weight, value in zip((of_own - log_total).exp_(), own[1::2], strict=True):
                mixed += weight.unsqueeze(-1).to(value.dtype) * value[0, :, None]
        output = packed.to(query.dtype).transpose(0, 1)[None]
        ctx.layout = layout
        ctx.save_for_backward(query, keys, values, output, log_total, *own)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, keys, values, output, log_total, *own = ctx.saved_tensors
        grouped = _grouped(query, keys) * query.shape[-1] ** -0.5
        grad = _grouped(grads[0], keys)
        # Softmax subtracts from every score's gradient the dot product of output and its gradient.
        common = (grad * _grouped(output, keys)).sum(-1, dtype=torch.float32)
        query_grad = torch.zeros_like(grouped)
        own_grads: list[torch.Tensor | None] = []
        for key, value in zip(own[0::2], own[1::2], strict=True):
            weight = (_own_scores(grouped, key) - log_total).exp_()
            score_grad = weight * (_own_scores(grad, value) - common)
            score_grad, weight = (part.to(query.dtype).unsqueeze(-1) for part in (score_grad, weight))
            query_grad += score_grad * key[0, :, None]
            own_grads += [(score_grad * grouped).sum(1)[None], (weight * grad).sum(1)[None]]
        key_grad, value_grad = torch.zeros_like(keys), torch.zeros_like(values)
        for tile in ctx.layout.tiles:
            wanted, rows = grad[:, :, tile.anchors].flatten(1, 2), tile.rows
            weights = _scores(grouped, keys, tile, ctx.layout, len(own) // 2)
            weights = weights.sub_(log_total[:, :, tile.anchors, None]).exp_()
            value_grad[0, :, rows] += weights.to(values.dtype).flatten(1, 2).mT @ wanted
            score_grad = (wanted @ values[0, :, rows].mT).float().view_as(weights)
            score_grad = score_grad.sub_(common[:, :, tile.anchors, None]).mul_(weights)
            flat = score_grad.to(query.dtype).flatten(1, 2)
            query_grad[:, :, tile.anchors] += (flat @ keys[0, :, rows]).view_as(grouped[:, :, tile.anchors])
            key_grad[0, :, rows] += flat.mT @ grouped[:, :, tile.anchors].flatten(1, 2)
        query_grad = query_grad.mul_(query.shape[-1] ** -0.5).flatten(0, 1)[None]
        return None, query_grad, key_grad, value_grad, *own_grads


def attend(query: torch.Tensor, keys: KeyValue, own: Sequence[KeyValue], layout: Layout) -> torch.Tensor:
    """[1, N, A, d] of `query` [1, N, A, d].

    `keys` = step-0 (keys, values) [1, N_kv, R, d]; `own` = one (key, value) pair [1, N_kv, A, d] for
    each step 1..k. All of one dtype, in which the matrix products run; softmax is float32.
    """
    flat = [tensor for pair in own for tensor in pair]
    return UnrolledAttention.apply(layout, query, *keys, *flat)  # type: ignore[no-untyped-call, no-any-return]


def _grouped(heads: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A view [N_kv, G, A, d] of `heads` [1, N, A, d]."""
    return heads[0].unflatten(0, (keys.shape[1], -1))  # type: ignore[no-any-return]


def _scores(grouped: torch.Tensor, keys: torch.Tensor, tile: Tile, layout: Layout, step: int) -> torch.Tensor:
    """float32 [N_kv, G, a, T], -inf where the row is hidden."""
    queries = grouped[:, :, tile.anchors]
    scores = (queries.flatten(1, 2) @ keys[0, :, tile.rows].mT).float()
    return scores.view(*queries.shape[:3], scores.shape[-1]).masked_fill_(
        layout.hidden(tile, step), float("-inf")
    )


def _own_scores(grouped: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """float32 [N_kv, G, A]: each row of `grouped` [N_kv, G, A, d] times its row of `own` [1, N_kv, A, d]."""
    return (grouped * own[0, :, None]).sum(-1, dtype=torch.float32)
