"""The order of visits: every sample `passes` times, in a window, and the same from any position."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.loader.passes import START, Block, Position, Visit, VisitOrder, at_most


def blocks_of(log: Sequence[int], size: int, holes: Collection[int] = ()) -> Callable[[int], Block[int]]:
    def read(number: int) -> Block[int]:
        start, stop = number * size, (number + 1) * size
        return Block([item for item in log[start:stop] if item not in holes], ends=stop >= len(log))

    return read


def all_visits(
    total: int,
    passes: int,
    block_size: int,
    position: Position = START,
    count: int = 3,
    holes: Collection[int] = (),
) -> list[Visit[int]]:
    order: VisitOrder[int] = VisitOrder(passes=passes, position=position)
    read, taken = blocks_of(range(total), block_size, holes), list[Visit[int]]()
    while visits := order.visits(at_most(count), read):
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
    total=st.integers(0, 30),
    passes=st.integers(1, 3),
    block_size=st.integers(1, 6),
    holes=st.sets(st.integers(0, 29)),
)
def test_a_hole_is_left_out_and_moves_no_other_sample_to_another_block(
    total: int, passes: int, block_size: int, holes: set[int]
) -> None:
    """A prompt that failed is in no block; every other sample is visited in the stages it always was."""
    whole, visits = (all_visits(total, passes, block_size, holes=h) for h in ((), holes))
    stages = [(v.item, _stage(v)) for v in whole if v.item not in holes]
    assert sorted((v.item, _stage(v)) for v in visits) == sorted(stages)


def _stage(visit: Visit[int]) -> int:
    return visit.after.stage if visit.after.offset else visit.after.stage - 1


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
    order: VisitOrder[int] = VisitOrder(passes=1)
    assert order.visits(at_most(1), lambda _: Block([1, 2], ends=False)) == [Visit(1, True, Position(0, 1))]
    assert order.visits(at_most(2), lambda _: None) is None
    taken = order.visits(at_most(2), lambda _: Block([3, 4], ends=False))
    assert taken is not None
    assert [v.item for v in taken] == [2, 3]


@pytest.mark.parametrize("position", [Position(), Position(3, 1), Position(9, 0)])
def test_the_window_bounds_what_a_resume_reads(position: Position) -> None:
    """At most `passes` blocks are read again, however long the run was."""
    assert VisitOrder.first_block(position, 3) == max(0, position.stage - 2)
