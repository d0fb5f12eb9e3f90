"""A trial finds what kills its process, over restarts, and convicts nobody else."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from paceline import InMemoryMetadataStore
from paceline.ledger.trial import Trial


class Died(BaseException):
    """The process is gone."""


def verdict(members: list[str], deadly: set[str], raising: set[str], chance: Sequence[int] = ()) -> list[str]:
    """The guilty, over as many processes as it takes; tries whose number is in `chance` die of nothing."""
    store, tries = InMemoryMetadataStore(), 0

    def is_harmless(tried: Sequence[str]) -> bool:
        nonlocal tries
        tries += 1
        if deadly & set(tried) or tries in chance:
            raise Died
        return not raising & set(tried)

    while True:
        try:
            return Trial(store, "t", members).run(is_harmless)
        except Died:
            assert tries < 200, "the trial must come to an end"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_exactly_the_guilty_are_found(size: int) -> None:
    """Deadly ones and failing ones, alone or together, wherever they stand."""
    rng = random.Random(size)
    members = [f"s{n}" for n in range(size)]
    for _ in range(20):
        guilty = rng.sample(members, min(size, rng.randint(0, 3)))
        deadly = set(guilty[:1])
        assert set(verdict(members, deadly, set(guilty[1:]))) == set(guilty)


@pytest.mark.parametrize("unlucky", range(1, 8))
def test_a_death_by_chance_convicts_nobody(unlucky: int) -> None:
    """One kill from outside, at whatever moment, only makes the trial longer."""
    assert verdict(list("abcd"), set(), set(), chance=[unlucky]) == []
    assert verdict(list("abcd"), {"c"}, set(), chance=[unlucky]) == ["c"]


def test_a_trial_of_other_members_starts_anew() -> None:
    """What an earlier batch was suspected of says nothing about this one."""
    store = InMemoryMetadataStore()

    def dies(_: Sequence[str]) -> bool:
        raise Died

    with pytest.raises(Died):
        Trial(store, "t", ["a", "b"]).run(dies)
    assert Trial(store, "t", ["a", "c"]).run(lambda _: True) == []
    assert store.facts()["trial.t"] is None
