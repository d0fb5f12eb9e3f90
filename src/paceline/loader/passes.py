"""The order in which samples are visited when each is trained on more than once.

A target writes more slowly than a draft learns, so a run may visit every sample `passes` times. The log is
cut into blocks. Stage s visits block s for the first time, block s - 1 for the second, and so on, taking
one sample of each in turn; after the last block further stages finish the older blocks. So a window of
`passes` blocks is enough for a run of any length, and the order is a pure function of the log. A `Position`
says how far a run is. With one pass the order is that of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Block(Generic[T]):
    """A stretch of the log, without failed prompts. `ends`: no block follows."""

    items: Sequence[T]
    ends: bool


@dataclass(frozen=True)
class Position:
    """All stages before `stage` are done, and `offset` visits of it."""

    stage: int = 0
    offset: int = 0


START = Position()


@dataclass(frozen=True)
class Visit(Generic[T]):
    """One use of a sample. `is_last`: no later visit follows. `after`: the run's position after it."""

    item: T
    is_last: bool
    after: Position


# How many of the next visits make a step; None if there is room for more.
Cut = Callable[[Sequence[Visit[T]]], int | None]


def at_most(count: int) -> Cut[T]:
    """Steps of `count` visits."""
    return lambda ready: count if len(ready) >= count else None


class VisitOrder(Generic[T]):
    """Turns consecutive blocks of the log into visits."""

    def __init__(self, *, passes: int, position: Position = START) -> None:
        """Begins to read at `first_block(position)`."""
        self._passes = passes
        self._stage = self.first_block(position, passes)
        self._skip_to = position
        self._window: list[list[T]] = []  # newest first
        self._ready: list[Visit[T]] = []
        self._ended = False

    @staticmethod
    def first_block(position: Position, passes: int) -> int:
        """The oldest block that a run at `position` may still visit."""
        return max(0, position.stage - passes + 1)

    def visits(self, cut: Cut[T], read_block: Callable[[int], Block[T] | None]) -> list[Visit[T]] | None:
        """The next visits, as many as `cut` says; all that are left at the end of the log.

        `read_block(number)` returns a block of the log, or None if it was interrupted; then no visit is
        taken and the result is None.
        """
        count = self._fill(cut, read_block)
        if count is None:
            return None
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken

    def look_ahead(self, cut: Cut[T], read_block: Callable[[int], Block[T] | None]) -> list[Visit[T]]:
        """The next visits, without taking them; fewer than `cut` asks for if `read_block` has no more now."""
        return self._ready[: self._fill(cut, read_block)]

    def _fill(self, cut: Cut[T], read_block: Callable[[int], Block[T] | None]) -> int | None:
        while (count := cut(self._ready)) is None and not self._is_over():
            block = Block[T]([], ends=True) if self._ended else read_block(self._stage)
            if block is None:
                return None
            self._ended = block.ends
            self._enter_stage(list(block.items))
        return len(self._ready) if count is None else count

    def put_back(self, visits: Sequence[Visit[T]]) -> None:
        """Return visits that were not made; the next call of `visits` begins with them."""
        self._ready[:0] = visits

    def _is_over(self) -> bool:
        return self._ended and not any(self._window[: self._passes - 1])

    def _enter_stage(self, block: list[T]) -> None:
        self._window = [block, *self._window][: self._passes]
        members = [
            (item, age == self._passes - 1)
            for turn in zip_longest(*[[(item,) for item in old] for old in self._window])
            for age, held in enumerate(turn)
            if held is not None
            for item in held
        ]
        stage, self._stage = self._stage, self._stage + 1
        for offset, (item, is_last) in enumerate(members, start=1):
            after = Position(stage, offset) if offset < len(members) else Position(stage + 1, 0)
            done = stage < self._skip_to.stage or (
                stage == self._skip_to.stage and offset <= self._skip_to.offset
            )
            if not done:
                self._ready.append(Visit(item, is_last, after))
