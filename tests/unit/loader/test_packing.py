"""A budget of tokens cuts the visits of a run into steps, by their lengths alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.loader.packing import packed, packs, shares
from paceline.loader.passes import Block, Position, Visit, VisitOrder
from paceline.loader.settings import LoaderSettings
from paceline.testing.light_run import LightRun, RunShape, expected_steps, uninterrupted

SIZES = st.lists(st.integers(0, 12), max_size=20)


def test_a_pack_is_full_or_the_next_sample_does_not_fit() -> None:
    assert packed([4, 3, 3, 1], 10) == 3
    assert packed([4, 3, 4], 10) == 2
    assert packed([4, 3, 2], 10) is None, "there is room for one more"
    assert packed([11, 1], 10) == 1, "longer than the budget: alone"
    assert packed([1, 11], 10) == 1
    assert packed([], 10) is None


def test_no_length_is_asked_for_that_does_not_matter() -> None:
    def lengths() -> Iterator[int]:
        yield from (6, 5)
        raise AssertionError("the third sample is not in this pack")

    assert packed(lengths(), 10) == 1


@given(sizes=SIZES, budget=st.integers(1, 20))
def test_packs_hold_every_sample_once_and_none_could_take_its_neighbour(
    sizes: list[int], budget: int
) -> None:
    found = [sizes[pack] for pack in packs(sizes, budget)]
    assert [size for pack in found for size in pack] == sizes
    assert all(sum(pack) <= budget or len(pack) == 1 for pack in found)
    assert all(sum(one) + other[0] > budget or sum(one) == budget for one, other in pairwise(found))


@given(sizes=SIZES, count=st.integers(1, 5))
def test_ranks_share_a_step_by_its_tokens(sizes: list[int], count: int) -> None:
    """Consecutive parts; the largest is at most a sample larger than an even share."""
    bounds = shares(sizes, count)
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(len(sizes)))
    parts = [sum(max(1, size) for size in sizes[start:stop]) for start, stop in bounds]
    assert len(parts) == count
    assert max(parts) <= sum(parts) / count + max([0, *sizes]) + count
    if len(sizes) >= count:
        assert all(stop > start for start, stop in bounds), "every rank has work"


SHAPES = [
    RunShape(prompts=13, passes=passes, tokens=tokens, bad_prompt=bad_prompt, bad_sample=bad_sample)
    for passes, tokens, bad_prompt, bad_sample in [
        (1, 50, -1, -1),
        (2, 50, 4, 8),  # a prompt that fails takes no room, a sample that cannot be trained does
        (2, 16, 5, 2),  # most samples are longer, each a step of its own
        (3, 400, -1, 7),  # the whole log in a few steps, so that a step visits a sample again
    ]
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_trains_the_steps_that_its_lengths_give(tmp_path: Path, shape: RunShape) -> None:
    """In the order of the visits, with a tail that is trained, and the same from every checkpoint."""
    found = uninterrupted(shape, tmp_path)
    wanted = expected_steps(shape)
    assert found.trained == [step for step in wanted if step]


def test_the_steps_on_record_are_those(tmp_path: Path) -> None:
    """Archived ones, too: a step without its quarantined sample, but cut as if it were there."""
    shape = SHAPES[1]
    run = LightRun(tmp_path / "run", shape)
    run.produce()
    run.consume()
    ledger = run.open_ledger()
    seen = [list(step.plan.sample_ids) for step in ledger.history()]
    ledger.close()
    assert seen == expected_steps(shape)


# -- how far a run is --------------------------------------------------------------------------


def visits_of(settings: LoaderSettings, size: int) -> list[Visit[int]]:
    """Every visit of a run to whose prompts nothing happens."""

    def read(number: int) -> Block[int]:
        places = settings.block(number)
        return Block(range(places.start, min(places.stop, size)), ends=places.stop >= size)

    return VisitOrder[int](passes=settings.passes).visits(lambda _: None, read) or []


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("starts", [(0,), (0, 10, 12)])
def test_the_share_of_visits_is_known_from_a_position_alone(passes: int, starts: tuple[int, ...]) -> None:
    """Before an extension it is the share of the run as it was."""
    settings = LoaderSettings(1, passes, 4, starts, tokens_per_step=9, size=21)
    visits, totals = visits_of(settings, 21), [passes * end for end in (*starts[1:], 21)]
    assert len(visits) == 21 * passes
    for count, visit in enumerate(visits, 1):
        total = next(total for total in totals if count <= total)
        assert settings.progress(visit.after) == count / total


def test_prompts_that_fail_count_as_visited_once_their_blocks_are() -> None:
    """Except those after the last visit of all."""
    settings = LoaderSettings(1, 2, 4, tokens_per_step=9, size=14)
    holes = {3, 12, 13}
    blocks = [[i for i in range(4 * n, min(4 * n + 4, 14)) if i not in holes] for n in range(4)]
    order: VisitOrder[int] = VisitOrder(passes=2)
    visits = order.visits(lambda _: None, lambda n: Block(blocks[n], ends=n == 3)) or []
    found = [settings.progress(visit.after) for visit in visits]
    assert found == sorted(found, key=lambda share: share or 0.0)
    assert found[-1] == 26 / 28


def test_a_run_without_an_end_and_steps_of_samples_have_no_such_share() -> None:
    assert LoaderSettings(3, size=14).progress(Position(1, 0)) is None
    assert LoaderSettings(3, tokens_per_step=9).progress(Position(1, 0)) is None
