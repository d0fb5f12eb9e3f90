"""The parts of the step that keep little for backward: their gradients, and what they keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.methods.eagle3 import attention
from paceline.methods.eagle3.attention import Layout, attend, tiles_of

HEADS, KV_HEADS, SIZE = 4, 2, 8


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), requires_grad=True)


def _same(
    ours: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> None:
    """Both give the same values, and the same gradients for an uneven gradient from above."""
    results = []
    for function in (ours, plain):
        value = function(*inputs)
        results.append([value.detach(), *torch.autograd.grad((value * value).sum(), inputs)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def _plain_attention(
    lengths: list[int], widths: list[int], places: torch.Tensor, window: int | None
) -> Callable[..., torch.Tensor]:
    """Stock attention, one sample at a time, its anchors' own keys behind a mask that is a diagonal."""

    def mix(query: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
        parts = []
        queries, at = query.split(widths, 2), places.split(widths)
        keys, values = (part.split(lengths, 2) for part in pairs[:2])
        own = [part.split(widths, 2) for part in pairs[2:]]
        for i, (length, width) in enumerate(zip(lengths, widths, strict=True)):
            seen = torch.arange(length) <= at[i][:, None]
            if window is not None:  # counted from the place of the step, which lies after the anchor
                seen &= torch.arange(length) > at[i][:, None] + len(own) // 2 - window
            diagonals = [torch.eye(width, dtype=torch.bool)] * (len(own) // 2)
            parts.append(
                F.scaled_dot_product_attention(
                    queries[i],
                    torch.cat([keys[i], *(part[i] for part in own[0::2])], 2),
                    torch.cat([values[i], *(part[i] for part in own[1::2])], 2),
                    attn_mask=torch.cat([seen, *diagonals], 1),
                    enable_gqa=True,
                )
            )
        return torch.cat(parts, 2)

    return mix


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("tile", [2, 256])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_attention_equals_stock_attention_with_a_mask(
    steps: int, tile: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and the gradients of queries, keys, values and every step's own pairs, over packed samples, one
    with prompts between its answers."""
    monkeypatch.setattr(attention, "TILE_ANCHORS", tile)
    lengths, widths = [9, 4, 12], [5, 3, 4]
    places = torch.tensor([3, 4, 5, 6, 7, 0, 1, 2, 1, 2, 6, 9])
    positions = torch.cat([torch.arange(n) for n in lengths])
    layout = Layout(positions, places, tiles_of(places.split(widths), lengths, window), window)
    inputs = [_random(1, HEADS, sum(widths), SIZE)]
    inputs += [_random(1, KV_HEADS, sum(lengths), SIZE, seed=i) for i in range(2)]
    inputs += [_random(1, KV_HEADS, sum(widths), SIZE, seed=i) for i in range(2 * steps)]

    def ours(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *own: torch.Tensor
    ) -> torch.Tensor:
        return attend(query, (keys, values), list(zip(own[0::2], own[1::2], strict=True)), layout)

    _same(ours, _plain_attention(lengths, widths, places, window), inputs)


def test_bfloat16_costs_attention_no_more_than_a_few_roundings() -> None:
    """The error of every gradient, relative to the same inputs in float64, is at most three roundings (2^-8
    each): no sum over hundreds of rows is made in bfloat16."""
    tokens, steps, pairs = 600, 2, [(HEADS, 400), (KV_HEADS, 600), (KV_HEADS, 600)]
    rows, places = torch.arange(tokens), torch.arange(199, 599)
    layout = Layout(rows, places, tiles_of([places], [tokens]))
    shapes = [*pairs, *[(KV_HEADS, 400)] * (2 * steps)]
    inputs = [_random(1, heads, n, SIZE, seed=i).detach().bfloat16() for i, (heads, n) in enumerate(shapes)]
    wanted = _random(1, HEADS, 400, SIZE, seed=50).detach().bfloat16()
    plain, found = _plain_attention([tokens], [400], places, None), []
    for dtype in (torch.bfloat16, torch.float64):
        query, keys, values, *own = given = [part.to(dtype).requires_grad_() for part in inputs]
        if dtype is torch.float64:
            mixed = plain(*given)
        else:
            mixed = attend(query, (keys, values), list(zip(own[0::2], own[1::2], strict=True)), layout)
        found.append(torch.autograd.grad(mixed, given, wanted.to(dtype)))
    for ours, exact in zip(*found, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 3 * 2**-8


def test_a_window_bounds_the_rows_of_a_tile() -> None:
    """Anchors far into a sample read the window before them, not the whole beginning."""
    anchors = [torch.arange(300, 600), torch.arange(5, 30)]
    tiles = tiles_of(anchors, [700, 40], window=20)
    spans = [(tile.rows.start, tile.rows.stop) for tile in tiles]
    assert spans == [(281, 428), (409, 556), (537, 600), (700, 730)]


def test_attention_keeps_no_score() -> None:
    """What is kept for backward grows with rows and anchors, never with their product."""
    tokens, kept = 200, []
    rows = torch.arange(tokens)
    layout = Layout(rows, rows, tiles_of([rows], [tokens]))
    query, keys, values = (_random(1, heads, tokens, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        attend(query, (keys, values), [], layout)
    assert sum(kept) <= (2 * HEADS + 2 * KV_HEADS) * tokens * SIZE + HEADS * tokens
