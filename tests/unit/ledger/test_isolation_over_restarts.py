"""An isolation finds what kills its process, over restarts, and names no other member."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from paceline.ledger.isolation import Isolation
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.ledger_calls import consumer_of, producer_of


class Died(BaseException):
    """The process is gone."""


def verdict(
    members: list[str], killing: set[str], raising: set[str], chance: Sequence[int] = ()
) -> list[str]:
    """The culprits, over as many processes as it takes; tries whose number is in `chance` die of nothing."""
    ledger, tries = SQLiteLedger(), 0

    def is_harmless(tried: Sequence[str]) -> bool:
        nonlocal tries
        tries += 1
        if killing & set(tried) or tries in chance:
            raise Died
        return not raising & set(tried)

    while True:
        try:
            return Isolation(consumer_of(ledger), "t", members).run(is_harmless)
        except Died:
            assert tries < 200, "it must come to an end"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_exactly_the_culprits_are_found(size: int) -> None:
    """Killing ones and failing ones, alone or together, wherever they stand."""
    rng = random.Random(size)
    members = [f"s{n}" for n in range(size)]
    for _ in range(20):
        culprits = rng.sample(members, min(size, rng.randint(0, 3)))
        killing = set(culprits[:1])
        assert set(verdict(members, killing, set(culprits[1:]))) == set(culprits)


@pytest.mark.parametrize("unlucky", range(1, 8))
def test_a_death_by_chance_makes_no_culprit(unlucky: int) -> None:
    """One kill from outside, at whatever moment, only makes it longer."""
    assert verdict(list("abcd"), set(), set(), chance=[unlucky]) == []
    assert verdict(list("abcd"), {"c"}, set(), chance=[unlucky]) == ["c"]


def test_an_isolation_of_other_members_starts_anew() -> None:
    """What an earlier batch was suspected of says nothing about this one."""
    session = consumer_of(SQLiteLedger())

    def dies(_: Sequence[str]) -> bool:
        raise Died

    with pytest.raises(Died):
        Isolation(session, "t", ["a", "b"]).run(dies)
    assert Isolation(session, "t", ["a", "c"]).run(lambda _: True) == []
    assert session.facts()["isolation.t"] is None


def test_two_workers_isolate_their_groups_side_by_side() -> None:
    """Each under a name of its own: one worker's death counts nothing against the other's."""
    ledger = SQLiteLedger()
    one, other = producer_of(ledger, "a"), producer_of(ledger, "b")

    def dies(_: Sequence[str]) -> bool:
        raise Died

    for _ in range(2):
        with pytest.raises(Died):
            Isolation(one, f"capture.{one.worker}", ["x"]).run(dies)
        assert Isolation(other, f"capture.{other.worker}", ["x"]).run(lambda _: True) == []
    assert Isolation(one, f"capture.{one.worker}", ["x"]).run(dies) == ["x"]


def test_an_isolation_that_an_older_version_began_goes_on() -> None:
    """It recorded its culprits under another word; they are not looked for again."""
    session = consumer_of(SQLiteLedger())
    begun = {"members": ["a", "b"], "queue": [["b"]], "guilty": ["a"], "trying": False, "deaths": 0}
    session.set_facts({"isolation.t": begun})
    assert Isolation(session, "t", ["a", "b"]).run(lambda _: True) == ["a"]
