"""The order of visits: every sample `passes` times, in a window, and the same from any position."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.loader.passes import START, Position, Visit, VisitOrder


def blocks_of(log: Sequence[int], start: int) -> Callable[[int], list[int]]:
    place = start

    def read(size: int) -> list[int]:
        nonlocal place
        block = list(log[place : place + size])
        place += len(block)
        return block

    return read


def all_visits(
    total: int, passes: int, block_size: int, position: Position = START, count: int = 3
) -> list[Visit[int]]:
    order: VisitOrder[int] = VisitOrder(passes=passes, block_size=block_size, position=position)
    first = VisitOrder.first_block(position, passes) * block_size
    read, taken = blocks_of(range(total), first), list[Visit[int]]()
    while visits := order.visits(count, read):
        taken += visits
    return taken


def test_one_pass_is_the_order_of_the_log() -> None:
    """Samples are planned in prompt order."""
    visits = all_visits(10, passes=1, block_size=4)
    assert [v.item for v in visits] == list(range(10))
    assert all(v.is_last for v in visits)


def test_two_passes_overlap_by_one_block() -> None:
    """A block comes back while the next one is new; the last block finishes alone."""
    visits = all_visits(5, passes=2, block_size=2)
    assert [v.item for v in visits] == [0, 1, 2, 0, 3, 1, 4, 2, 3, 4]
    assert [v.item for v in visits if v.is_last] == [0, 1, 2, 3, 4]


@given(
    total=st.integers(0, 40), passes=st.integers(1, 4), block_size=st.integers(1, 7), count=st.integers(1, 9)
)
def test_every_sample_is_visited_exactly_so_often(
    total: int, passes: int, block_size: int, count: int
) -> None:
    """Nothing is left out or repeated, the last visit is marked as such, and batches do not matter."""
    visits = all_visits(total, passes, block_size, count=count)
    for item in range(total):
        mine = [v.is_last for v in visits if v.item == item]
        assert mine == [False] * (passes - 1) + [True]
    assert len(visits) == total * passes
    assert visits == all_visits(total, passes, block_size, count=1)


@given(
    total=st.integers(1, 30), passes=st.integers(1, 4), block_size=st.integers(1, 6), cut=st.integers(0, 120)
)
def test_any_position_continues_the_same_order(total: int, passes: int, block_size: int, cut: int) -> None:
    """A run that resumes anywhere visits exactly what the uninterrupted one would have."""
    visits = all_visits(total, passes, block_size)
    cut %= len(visits)
    rest = all_visits(total, passes, block_size, position=visits[cut].after)
    assert rest == visits[cut + 1 :]


def test_an_interrupted_read_takes_nothing() -> None:
    """A stop while waiting for a block leaves the order where it was."""
    order: VisitOrder[int] = VisitOrder(passes=1, block_size=2)
    assert order.visits(1, lambda _: [1, 2]) == [Visit(1, True, Position(0, 1))]
    assert order.visits(2, lambda _: None) is None
    taken = order.visits(2, lambda _: [3, 4])
    assert taken is not None
    assert [v.item for v in taken] == [2, 3]


@pytest.mark.parametrize("position", [Position(), Position(3, 1), Position(9, 0)])
def test_the_window_bounds_what_a_resume_reads(position: Position) -> None:
    """At most `passes` blocks are read again, however long the run was."""
    assert VisitOrder.first_block(position, 3) == max(0, position.stage - 2)
