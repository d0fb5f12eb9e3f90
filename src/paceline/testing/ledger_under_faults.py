"""Seeded histories of ledger calls while connections break and servers die, compared with the specification.

A call whose result got lost is repeated under its number, as a session does it. Whatever happened on the way,
every call has the specification's answer, and the ledger ends with its content and its number of changes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

from paceline.errors import UnknownResultError
from paceline.ledger.ledger import Ledger
from paceline.ledger.records import SourceBlock
from paceline.testing.broken_link import BrokenLink, Moment, nothing
from paceline.testing.ledger_history import PROMPTS, WORKERS, Call, History, state_of
from paceline.testing.specification_of_steps import SpecificationLedger

ARCHIVE_FROM = 4
TRIES = 20  # a slow machine may take longer to answer than a test waits
Strike = Callable[[str, Callable[[], None]], None]  # makes the call of this name, and harms it
KINDS = frozenset(
    (
        *("acquire", "extend", "lease", "give_back", "end_stream", "reserve", "commit"),
        *("report_lost", "swept", "plan", "head", "fall_back", "retire", "quarantine", "release"),
        *("set_facts", "settle_facts"),
    )
)


class DisagreementError(AssertionError):
    """A fault changed the outcome."""


class WholeHistory(History):
    """Calls of every kind."""

    def _trouble(self) -> Iterator[Call]:
        turn = self.rng.randrange(10)
        if turn == 0:
            yield from self._change("end_stream", self.rng.choice(WORKERS), self.rng.random() < 0.5)
        elif turn == 1:
            facts = {f"settled {self.rng.randrange(9)}": self.rng.random()}
            [(_, call)] = self._change("set_facts", "", facts, settle=True)
            yield "settle_facts", call
        elif turn == 2 and (heads := self.ledger.snapshot().checkpoints):
            yield from self._change("fall_back", "", heads[0].step)
        elif turn == 3:
            yield from self._change("extend", WORKERS[0], [SourceBlock(0, PROMPTS, "prompts")])
        else:
            yield from super()._trouble()


def play(ledger: Ledger, seed: int, count: int, strike: Strike) -> Iterator[tuple[str, Any, int]]:
    """Make the seed's calls; of each its name, the answer and how many changes the ledger has then."""
    ledger.archive_from = ARCHIVE_FROM  # type: ignore[attr-defined]
    history = WholeHistory(ledger, random.Random(seed))
    for name, call in history.calls(count):
        try:
            strike(name, partial(settled, call))
        except Exception as error:  # the specification answers every call
            told = f"{type(error).__name__}: {error}"
            raise DisagreementError(f"seed {seed}: {name} has no answer, but {told}") from error
        yield name, history.answer if name != "acquire" else dict(history.fences), ledger.lsn()


def settled(call: Callable[[], None]) -> None:
    """Repeat it while its result is unknown."""
    for _ in range(TRIES - 1):
        try:
            return call()
        except UnknownResultError:
            continue
    return call()


def undisturbed(_: str, call: Callable[[], None]) -> None:
    call()


@cache
def expected(seed: int, count: int) -> tuple[list[tuple[str, Any, int]], dict[str, Any]]:
    """The specification's answers, and what it holds in the end."""
    ledger = SpecificationLedger()
    return list(play(ledger, seed, count, undisturbed)), state_of(ledger)


def compare(ledger: Ledger, seed: int, count: int, strike: Strike, direct: Ledger | None = None) -> None:
    """Raises DisagreementError at the first answer that differs. `direct`: the same ledger, undisturbed."""
    answers, state = expected(seed, count)
    for found, wanted in zip(play(ledger, seed, count, strike), answers, strict=True):
        if found != wanted:
            raise DisagreementError(f"seed {seed}: expected {wanted}\nfound {found}")
    if (now := state_of(direct or ledger)) != state:
        differ = [name for name in state if now[name] != state[name]]
        raise DisagreementError(f"seed {seed}: other {differ} in the end: {[now[name] for name in differ]}")


class Strikes:
    """Breaks calls over `link`: each kind of call, at each of `moments`, `each` times; then does `then`."""

    def __init__(
        self,
        link: BrokenLink,
        seed: int,
        moments: Sequence[Moment] = tuple(Moment),
        *,
        then: Callable[[], None] = nothing,
        each: int = 1,
    ) -> None:
        self.counts: Counter[tuple[str, Moment]] = Counter()
        self._link, self._moments, self._then, self._each = link, list(moments), then, each
        self._rng = random.Random(seed)

    def __call__(self, name: str, call: Callable[[], None]) -> None:
        moment = min(self._moments, key=lambda moment: self.counts[name, moment])
        if self.counts[name, moment] < self._each:
            self._link.strike(name.replace("settle_facts", "set_facts"), moment, self._then)
            self.counts[name, moment] += 1
        call()
        if self._link.is_armed:
            raise DisagreementError(f"{name} was not sent")
        if self._rng.random() < 0.5:
            self._link.deliver()
