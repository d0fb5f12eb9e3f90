"""Attention of blocks: a place sees the target's features before its block's anchor, and its own block.

The features are keys and values of the context; a block holds its anchor's token and mask tokens. Blocks of
one sample overlap in the text but never see each other. On a CPU neighbouring blocks of a sample are computed
together, as tiles, against the rows before the last of them. On CUDA one FlexAttention kernel takes the whole
batch, with the same rule as its mask; tests compare both on the CPU (the kernel itself has not run on a GPU).

Legend: R rows of all samples, A blocks of all samples, B places of a block, N query heads, N_kv key-value
heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.precision import is_autocasting

KeyValue = tuple[torch.Tensor, torch.Tensor]
# Queries [1, N, A * B, d], the context's keys and values [1, N_kv, R, d], the blocks' own [1, N_kv, A * B,
# d].
Attend = Callable[[torch.Tensor, KeyValue, KeyValue], torch.Tensor]

TILE_BLOCKS = 16
KERNEL_TILE = 128  # queries, and keys, of FlexAttention's masks
KERNEL_HEAD_DIM = 16  # it takes no narrower heads
KERNEL_FORMS = 64  # see _compiled_flex_attention


@dataclass(frozen=True)
class Tile:
    """Neighbouring blocks of one sample and the rows before the last of them, as slices on the host."""

    blocks: slice  # of the A
    rows: slice  # of the R


@dataclass(frozen=True)
class Layout:
    """Which rows each block sees: those of its sample before its anchor's place."""

    block_size: int
    causal: bool
    positions: torch.Tensor  # int64 [R]: of the row in its sample
    samples: torch.Tensor  # int64 [R]: the number of the row's sample
    places: torch.Tensor  # int64 [A]: of the anchor's token in its sample
    owners: torch.Tensor  # int64 [A]: the number of the block's sample
    tiles: tuple[Tile, ...]
    compiled: bool = True  # on CUDA by the kernel


def tiles_of(places: Sequence[torch.Tensor], lengths: Sequence[int]) -> tuple[Tile, ...]:
    """The tiles of samples with `lengths` rows, whose anchors' places int64 [a] ascend in each sample."""
    tiles, row, block = [], 0, 0
    for own, length in zip(places, lengths, strict=True):
        for part in own.split(TILE_BLOCKS) if own.numel() else ():
            last = block + part.numel()
            tiles.append(Tile(slice(block, last), slice(row, row + int(part[-1]))))
            block = last
        row += length
    return tuple(tiles)


def attention_over(layout: Layout) -> Attend:
    """The attention of one batch; build it once and call it in every layer. The result is [1, N, A * B,
    d]."""
    if layout.positions.is_cuda and layout.compiled:
        return _flex(layout, _compiled_flex_attention())
    return tiled(layout)


def tiled(layout: Layout) -> Attend:
    """The same tile by tile, on every device: on CUDA for a few blocks, which need no kernel of their own."""

    def attend(query: torch.Tensor, context: KeyValue, own: KeyValue) -> torch.Tensor:
        parts: tuple[torch.Tensor, ...] = query, *context, *own
        if is_autocasting(query.device):
            # Backward computes a second time, outside of autocast, and must do so in the same dtype.
            parts = tuple(part.to(torch.get_autocast_dtype(query.device.type)) for part in parts)
        return TiledAttention.apply(layout, *parts)  # type: ignore[no-untyped-call, no-any-return]

    return attend


class TiledAttention(torch.autograd.Function):
    """Use `attention_over`; this class only carries the gradients.

    Plain autograd keeps mask, keys and values of every tile, which grow with the square of a sample's length
    where its anchors do. This function keeps its inputs; backward computes each tile again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        own_keys: torch.Tensor,
        own_values: torch.Tensor,
    ) -> torch.Tensor:
        ctx.layout = layout
        ctx.save_for_backward(query, keys, values, own_keys, own_values)
        output = torch.empty_like(query)
        for tile in layout.tiles:
            slots = _slots(layout, tile)
            pair = _seen(tile, slots, keys, own_keys), _seen(tile, slots, values, own_values)
            output[:, :, slots] = _of_tile(layout, tile, query[:, :, slots], *pair)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layout, (query, keys, values, own_keys, own_values) = ctx.layout, ctx.saved_tensors
        query_grad = torch.empty_like(query)
        own_grads = torch.empty_like(own_keys), torch.empty_like(own_values)
        grads_of_rows = [torch.zeros_like(part, dtype=torch.float32) for part in (keys, values)]
        for tile in layout.tiles:
            slots = _slots(layout, tile)
            seen = [_seen(tile, slots, *pair) for pair in ((keys, own_keys), (values, own_values))]
            with torch.enable_grad():
                inputs = [part.detach().requires_grad_() for part in (query[:, :, slots], *seen)]
                mixed = _of_tile(layout, tile, *inputs)
            query_grad[:, :, slots], *of_seen = torch.autograd.grad(mixed, inputs, grads[0][:, :, slots])
            rows = tile.rows.stop - tile.rows.start
            for grad, of_rows, of_own in zip(of_seen, grads_of_rows, own_grads, strict=True):
                of_rows[:, :, tile.rows] += grad[:, :, :rows]
                of_own[:, :, slots] = grad[:, :, rows:]
        key_grad, value_grad = (grad.to(keys.dtype) for grad in grads_of_rows)
        return None, query_grad, key_grad, value_grad, *own_grads


def _slots(layout: Layout, tile: Tile) -> slice:
    """The places of the tile's blocks."""
    return slice(tile.blocks.start * layout.block_size, tile.blocks.stop * layout.block_size)


def _seen(tile: Tile, slots: slice, context: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return torch.cat((context[:, :, tile.rows], own[:, :, slots]), dim=2)


def _of_tile(
    layout: Layout, tile: Tile, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    mask = _mask(layout, tile)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def _mask(layout: Layout, tile: Tile) -> torch.Tensor:
    """Bool [a * B, T + a * B] of a tile of a blocks and T rows: True where a place sees a key."""
    places, size = layout.places[tile.blocks], layout.block_size
    before = layout.positions[tile.rows] < places[:, None]
    block = torch.ones(size, size, dtype=torch.bool, device=places.device)
    block = block.tril() if layout.causal else block
    same = torch.eye(places.numel(), dtype=torch.bool, device=places.device)
    own = (same[:, None, :, None] & block[None, :, None, :]).reshape(places.numel() * size, -1)
    return torch.cat((before.repeat_interleave(size, 0), own), dim=1)


def _flex(layout: Layout, flex_attention: Any) -> Attend:
    if not layout.places.numel():
        return tiled(layout)
    block_mask = block_mask_of(layout)

    def attend(query: torch.Tensor, context: KeyValue, own: KeyValue) -> torch.Tensor:
        if query.shape[-1] < KERNEL_HEAD_DIM:
            return tiled(layout)(query, context, own)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(context, own, strict=True))
        mixed: torch.Tensor = flex_attention(query, keys, values, block_mask=block_mask, enable_gqa=True)
        return mixed

    return attend


def block_mask_of(layout: Layout) -> Any:
    """The kernel's mask, for keys of the context before those of the blocks.

    `create_block_mask` of the library asks for every query and key, gigabytes for a usual batch. What one
    anchor sees are two stretches of keys, so it suffices to set their ends against those of the tiles.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device, size = layout.places.device, layout.block_size
    rows, slots = layout.positions.numel(), layout.places.numel() * size
    numbers = torch.arange(slots, device=device)
    blocks = numbers // size
    # The rule asks tables alone: a number that it captured would be a symbol of the kernel (dynamic=True).
    # Of every key: the number of its sample, or -1 less its block's; its place there, or its slot.
    owners, places = torch.cat((layout.samples, -1 - blocks)), torch.cat((layout.positions, numbers))
    # Of every query: its block's sample, the same of its block, its anchor's place, its last slot seen.
    sample, own_block, anchor = layout.owners[blocks], -1 - blocks, layout.places[blocks]
    last = numbers if layout.causal else torch.full_like(numbers, slots)

    def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        owner, place = owners[key], places[key]
        before = (owner == sample[query]) & (place < anchor[query])
        return before | ((owner == own_block[query]) & (place <= last[query]))

    first = torch.searchsorted(layout.samples, layout.owners)  # row of each block's sample
    begins = torch.arange(0, rows + slots, KERNEL_TILE, device=device)
    ends = begins + KERNEL_TILE
    own_first = rows + torch.arange(0, slots, size, device=device)
    touched, whole = _stretch(first, first + layout.places, begins, ends)
    touched |= _stretch(own_first, own_first + size, begins, ends)[0]  # it is shorter than a tile
    touched, whole = (_of_tiles(part, size) for part in (touched, whole))
    whole = whole.all(2)
    parts = [_ordered(kind) for kind in (touched.any(2) & ~whole, whole)]
    return BlockMask.from_kv_blocks(
        *parts[0], *parts[1], BLOCK_SIZE=KERNEL_TILE, mask_mod=sees, seq_lengths=(slots, rows + slots)
    )


def _stretch(
    first: torch.Tensor, stop: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [A, tiles of keys], whether a tile has some of each block's keys `first` to `stop`, and only
    such."""
    first, stop = first[:, None], stop[:, None]
    return (first < ends) & (stop > begins) & (first < stop), (first <= begins) & (stop >= ends)


def _of_tiles(of_blocks: torch.Tensor, size: int) -> torch.Tensor:
    """[1, tiles of queries, KERNEL_TILE, tiles of keys] of what holds for blocks [A, tiles of keys]; False
    for the queries that fill the last tile."""
    of_slots = of_blocks.repeat_interleave(size, 0)
    padding = -of_slots.shape[0] % KERNEL_TILE
    whole: torch.Tensor = F.pad(of_slots, (0, 0, 0, padding)).unflatten(0, (-1, KERNEL_TILE))
    return whole[None]


def _ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tiles of keys are chosen for each tile of queries, and which, the chosen ones first, from bool
    [1, tiles of queries, tiles of keys]."""
    number = chosen[None].int()
    return number.sum(-1).int(), number.argsort(dim=-1, descending=True, stable=True).int()


@cache
def _compiled_flex_attention() -> Any:
    """The kernel in as many forms as lengths ask for: of one tile or several, whole or not, in each type.

    After eight forms torch would compute without any kernel and keep a score of every query and key, which no
    GPU has room for; now it would raise.
    """
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNEL_FORMS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
