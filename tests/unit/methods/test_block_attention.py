"""Attention of blocks against a loop that asks for every key whether it is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from paceline.methods.dflash import attention
from paceline.methods.dflash.attention import KeyValue, Layout, tiles_of

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, attention.KERNEL_HEAD_DIM, 3
LENGTHS = [7, 5, 6]
PLACES = [torch.tensor([1, 2, 4, 5, 7]), torch.tensor([], dtype=torch.int64), torch.tensor([3, 6])]


def _layout(causal: bool) -> Layout:
    owners = torch.tensor([n for n, places in enumerate(PLACES) for _ in places])
    samples = torch.tensor([n for n, length in enumerate(LENGTHS) for _ in range(length)])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return Layout(BLOCK, causal, positions, samples, torch.cat(PLACES), owners, tiles_of(PLACES, LENGTHS))


def _tensors() -> tuple[torch.Tensor, KeyValue, KeyValue]:
    generator = torch.Generator().manual_seed(1)

    def random(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, SIZE, generator=generator, requires_grad=True)

    slots, rows = BLOCK * 7, sum(LENGTHS)
    context, own = ((random(KV_HEADS, n), random(KV_HEADS, n)) for n in (rows, slots))
    return random(HEADS, slots), context, own


def _by_loop(layout: Layout, query: torch.Tensor, context: KeyValue, own: KeyValue) -> torch.Tensor:
    """float64 [1, N, slots, d]: a slot sees the rows of its sample before its anchor, and its own block."""
    result = torch.zeros(query.shape, dtype=torch.float64)
    rows = layout.positions.numel()
    for slot in range(query.shape[2]):
        block = slot // BLOCK
        seen = [
            row
            for row in range(rows)
            if layout.samples[row] == layout.owners[block] and layout.positions[row] < layout.places[block]
        ]
        last = slot if layout.causal else block * BLOCK + BLOCK - 1
        mine = list(range(block * BLOCK, last + 1))
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            keys, values = (
                torch.cat((of[0][0, shared, seen], of[1][0, shared, mine])).double()
                for of in ((context[0], own[0]), (context[1], own[1]))
            )
            scores = keys @ query[0, head, slot].double() / math.sqrt(SIZE)
            result[0, head, slot] = scores.softmax(0) @ values
    return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tile", [2, 16])
def test_a_slot_sees_the_rows_before_its_anchor_and_its_block(
    causal: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, whatever the tiles; a sample without blocks takes no part."""
    monkeypatch.setattr(attention, "TILE_BLOCKS", tile)
    layout, (query, context, own) = _layout(causal), _tensors()
    inputs = [query, *context, *own]
    wanted = _by_loop(layout, query, context, own)
    found = attention.attention_over(layout)(query, context, own)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad((found * found).sum(), inputs),
        torch.autograd.grad((wanted * wanted).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_mask_of_the_cuda_kernel_is_the_same_rule(causal: bool) -> None:
    """FlexAttention without compilation computes on the CPU what its kernel does on CUDA."""
    layout, (query, context, own) = _layout(causal), _tensors()
    plain = query.detach(), *(tuple(part.detach() for part in pair) for pair in (context, own))
    found = attention._flex(layout, flex_attention)(*plain)  # its backward is not made for a CPU
    torch.testing.assert_close(found.double(), _by_loop(layout, *plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_the_rule_of_the_mask_reads_tables_alone(causal: bool) -> None:
    """A captured number would be a symbol in the kernel's text, as lengths are."""
    rule = attention.block_mask_of(_layout(causal)).mask_mod
    assert all(isinstance(cell.cell_contents, torch.Tensor) for cell in rule.__closure__)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_batches_of_other_lengths_take_the_form_of_the_kernel_that_is_compiled() -> None:
    """They are traced as symbols, one for numbers that are equal in the first batch: these have 8 and 11
    tiles. What is traced is what CUDA's kernel would be made of."""
    counter = CompileCounter()
    traced = torch.compile(flex_attention, backend=counter, dynamic=True, fullgraph=True)
    try:
        for length, blocks in ((400, 60), (701, 23), (290, 17), (555, 40)):
            places = torch.arange(3, 3 + 4 * blocks, 4)
            numbers = torch.zeros(length, dtype=torch.int64)
            owners = torch.zeros(blocks, dtype=torch.int64)
            layout = Layout(
                16, False, torch.arange(length), numbers, places, owners, tiles_of([places], [length])
            )
            query = torch.zeros(1, HEADS, 16 * blocks, SIZE)
            pairs = (
                (torch.zeros(1, KV_HEADS, n, SIZE), torch.zeros(1, KV_HEADS, n, SIZE))
                for n in (length, 16 * blocks)
            )
            with torch.no_grad():
                attention._flex(layout, traced)(query, *pairs)
        assert counter.frame_count == 1
    finally:
        torch.compiler.reset()


def test_heads_that_the_kernel_does_not_take_go_in_tiles() -> None:
    """The demo's target has such heads; a real one has wider ones."""

    def kernel(*_: object, **__: object) -> None:
        raise AssertionError("the kernel takes no heads of fewer than 16 numbers")

    query, context, own = _tensors()
    narrow = (query[..., :8], *(tuple(part[..., :8] for part in pair) for pair in (context, own)))
    layout = _layout(causal=False)
    assert torch.equal(attention._flex(layout, kernel)(*narrow), attention.tiled(layout)(*narrow))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("size", "lengths", "chosen"),
    [
        (3, [7, 5, 6], [[1, 2, 3, 5, 6], [], [2, 5]]),
        (16, [200, 90], [range(5, 191, 6), range(8, 90, 10)]),
        # The tile of keys before, at and after each end of what the two blocks of a tile of queries see.
        (64, [300, 90], [[127, 128, 129, 130, 255, 256, 257, 258], [83, 84, 85, 86]]),
    ],
)
def test_the_kernels_tiles_are_those_that_the_library_finds(
    causal: bool, size: int, lengths: list[int], chosen: list[Sequence[int]]
) -> None:
    """Which of them are whole, too; the library asks for every query and key."""
    places = [torch.tensor(list(one)).long() for one in chosen]
    counts = [len(one) for one in chosen]
    numbers = torch.arange(len(lengths))
    samples = numbers.repeat_interleave(torch.tensor(lengths))
    owners = numbers.repeat_interleave(torch.tensor(counts))
    positions = torch.cat([torch.arange(length) for length in lengths])
    layout = Layout(size, causal, positions, samples, torch.cat(places), owners, tiles_of(places, lengths))
    found, slots = attention.block_mask_of(layout), size * sum(counts)
    wanted = create_block_mask(found.mask_mod, None, None, slots, sum(lengths) + slots, device="cpu")
    assert found.shape == wanted.shape
    for part in ("kv", "full_kv", "q", "full_q"):
        for name in (f"{part}_num_blocks", f"{part}_indices"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_a_batch_without_blocks_has_no_output() -> None:
    """And runs backward."""
    _, context, own = _tensors()
    empty = torch.zeros(1, HEADS, 0, SIZE, requires_grad=True)
    none = torch.tensor([], dtype=torch.int64)
    layout = Layout(BLOCK, False, torch.arange(7), torch.zeros(7, dtype=torch.int64), none, none, ())
    found = attention.attention_over(layout)(empty, context, tuple(part[:, :, :0] for part in own))
    assert found.shape == empty.shape
    found.sum().backward()
