"""Attention of an unrolled step that keeps no scores for backward.

A query of step k attends to the keys from target features (rows up to its own, step 0) and to its own
row's keys of steps 1..k; a window hides rows that lie further back. Plain autograd keeps the weights of every
step, a x T per sample and head, several times over. This function keeps only queries, keys, values and the
output; backward computes the weights again, tile by tile, as FlashAttention does (arXiv 2205.14135,
algorithm 4). A tile is some neighbouring anchors of one sample and the rows that they can see, so weights
take memory of the order of T, not a x T, and no score outside the tile is computed. Everything of that size
has the dtype of the products: on a CPU the passes over it cost as much as the products themselves.

Legend: R rows of all samples, A anchors of all samples, T and a rows and anchors of one tile, N query
heads, N_kv key-value heads, G = N / N_kv, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.methods.eagle3.settings import TILE_ANCHORS

KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Tile:
    """Neighbouring anchors of one sample and the rows that they can see, as slices on the host. All of the
    anchors see the first `common` rows."""

    anchors: slice  # of the A
    rows: slice  # of the R
    common: int


@dataclass(frozen=True)
class Layout:
    """Which keys each anchor may see: those of its tile whose position is not after its own."""

    positions: torch.Tensor  # int64 [R]: of the row in its sample
    places: torch.Tensor  # int64 [A]: the same of the anchor's row
    tiles: tuple[Tile, ...]
    window: int | None = None  # a row sees itself and the `window` - 1 rows before it

    def hidden(self, tile: Tile, step: int) -> torch.Tensor:
        """Bool [a, T - common], True where the row comes after the anchor, or lies too far before its step
        `step`."""
        rows, places = self.positions[tile.rows][tile.common :], self.places[tile.anchors, None]
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
            common = int(part[0]) + 1 if window is None else 0
            tiles.append(Tile(slice(anchor, last), slice(row + first, row + int(part[-1]) + 1), common))
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
        packed = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        mixed = _grouped(packed.transpose(0, 1)[None], keys)
        of_own = _of_own(grouped, own[0::2])
        for tile in layout.tiles:
            among_rows, among_own = _weights(grouped, _rows(keys, tile), of_own, tile, layout)
            part = (among_rows @ _rows(values, tile)).view(*among_own.shape[:3], -1)
            for step, value in enumerate(own[1::2]):
                part += among_own[..., step, None] * value[0, :, None, tile.anchors]
            mixed[:, :, tile.anchors] = part
        output = packed.transpose(0, 1)[None]
        ctx.layout = layout
        ctx.save_for_backward(query, keys, values, output, *own)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, keys, values, output, *own = ctx.saved_tensors
        grouped = _grouped(query, keys) * query.shape[-1] ** -0.5
        grad = _grouped(grads[0], keys)
        # Softmax subtracts from every score's gradient the dot product of output and its gradient.
        common = (grad * _grouped(output, keys)).sum(-1, keepdim=True, dtype=torch.float32)
        query_grad = torch.empty_like(grouped)
        key_grad, value_grad = (torch.zeros_like(part, dtype=torch.float32) for part in (keys, values))
        of_own = _of_own(grouped, own[0::2])
        own_weights = torch.empty_like(of_own)
        for tile in ctx.layout.tiles:
            queries, wanted, less = (
                part[:, :, tile.anchors].flatten(1, 2) for part in (grouped, grad, common.to(grad.dtype))
            )
            key, value = _rows(keys, tile), _rows(values, tile)
            weights, own_weights[:, :, tile.anchors] = _weights(grouped, key, of_own, tile, ctx.layout)
            value_grad[0, :, tile.rows] += weights.mT @ wanted
            score_grad = (wanted @ value.mT).sub_(less).mul_(weights)
            query_grad[:, :, tile.anchors] = (score_grad @ key).unflatten(1, (grouped.shape[1], -1))
            key_grad[0, :, tile.rows] += score_grad.mT @ queries
        own_grads: list[torch.Tensor | None] = []
        of_own_grad = (_of_own(grad, own[1::2]) - common).mul_(own_weights).to(query.dtype)
        for step, key in enumerate(own[0::2]):
            weight, score_grad = own_weights[..., step, None], of_own_grad[..., step, None]
            query_grad += score_grad * key[0, :, None]
            own_grads += [(score_grad * grouped).sum(1)[None], (weight * grad).sum(1)[None]]
        query_grad = query_grad.mul_(query.shape[-1] ** -0.5).flatten(0, 1)[None]
        return None, query_grad, key_grad.to(keys.dtype), value_grad.to(values.dtype), *own_grads


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


def _rows(states: torch.Tensor, tile: Tile) -> torch.Tensor:
    """[N_kv, T, d], with a copy: products of many heads would make one each."""
    return states[0, :, tile.rows].contiguous()


def _weights(
    grouped: torch.Tensor, keys: torch.Tensor, of_own: torch.Tensor, tile: Tile, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the anchors of a tile take of its rows [N_kv, G * a, T] and of their own k rows [N_kv, G, a, k],
    with the tile's `keys` [N_kv, T, d]. Softmax computes in float32."""
    queries, step = grouped[:, :, tile.anchors], of_own.shape[-1]
    scores = (queries.flatten(1, 2) @ keys.mT).view(*queries.shape[:3], -1)
    scores[..., tile.common :].masked_fill_(layout.hidden(tile, step), float("-inf"))
    if step:
        scores = torch.cat((scores, of_own[:, :, tile.anchors]), dim=-1)
    weights = scores.softmax(-1)
    among_rows, among_own = weights.tensor_split((keys.shape[1],), dim=-1)
    return among_rows.flatten(1, 2).contiguous(), among_own


def _of_own(grouped: torch.Tensor, own: Sequence[torch.Tensor]) -> torch.Tensor:
    """[N_kv, G, A, k]: each row of `grouped` [N_kv, G, A, d] times its row of each of `own`."""
    parts = [(grouped * part[0, :, None]).sum(-1) for part in own]
    return torch.stack(parts, -1) if parts else grouped.new_empty(*grouped.shape[:3], 0)
