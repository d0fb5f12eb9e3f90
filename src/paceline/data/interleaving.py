"""Interleaving: the order of several sources' samples, which follows from their numbers and the run's seed.

The samples of all sources are spread evenly over the order, in blocks; within a block the order is shuffled
by the seed. Nothing is drawn at random, so an ordinal says which sample it is, without a look at any other.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence

from paceline.data.source import BLOCK

Turn = tuple[int, int]  # the number of a source, and which of its turns


class Interleaving:
    """`sizes`: samples of each source. `counts`: turns of each source; more than its samples if they come
    again, fewer if some are skipped.
    """

    def __init__(self, sizes: Sequence[int], counts: Sequence[int], seed: int) -> None:
        self._sizes, self._counts, self._seed = sizes, counts, seed
        self.size = sum(counts)
        self._num_blocks = math.ceil(self.size / BLOCK)

    def block_of(self, ordinal: int) -> int:
        return bisect_right(range(self._num_blocks), ordinal, key=self.start) - 1

    def start(self, block: int) -> int:
        """The block's first ordinal."""
        return sum(self._first(source, block) for source in range(len(self._counts)))

    def turns(self, block: int) -> list[Turn]:
        """The block's turns, in the order of a keyed digest."""
        turns = [
            (source, turn)
            for source in range(len(self._counts))
            for turn in range(self._first(source, block), self._first(source, block + 1))
        ]
        return sorted(turns, key=lambda turn: hashlib.sha256(f"{self._seed}:{turn}".encode()).digest())

    def place_of(self, source: int, turn: int) -> tuple[int, int]:
        """Which time the source is gone through, from 0, and the place in it. The last time may skip some."""
        size, count = self._sizes[source], self._counts[source]
        time, place = divmod(turn, size)
        last = min(size, count - time * size)
        return time, place * size // last

    def ordinal_of(self, source: int, place: int) -> int | None:
        """Where the sample at this place of the source comes first; None if it does not come."""
        size, count = self._sizes[source], self._counts[source]
        turn = -(-place * min(size, count) // size)
        if turn >= count or self.place_of(source, turn) != (0, place):
            return None
        block = bisect_right(range(self._num_blocks), turn, key=lambda b: self._first(source, b)) - 1
        return self.start(block) + self.turns(block).index((source, turn))

    def _first(self, source: int, block: int) -> int:
        """The source's first turn in the block: each block has an equal share of every source."""
        return block * self._counts[source] // self._num_blocks
