"""Mixture: several sources in one order, which follows from their sizes, their weights and the run's seed.

A round takes `weight` times the size of a source of it: of weight 2 each sample twice, of 0.5 every second
one. The samples of all sources are spread evenly over the order, in blocks; within a block the order is
shuffled by the seed. Nothing is drawn at random, so a sample's place says which one it is, without a look at
any other.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice

from paceline.data.dataset import Dataset
from paceline.data.index import LONGEST_KEPT
from paceline.data.prompts import Prompt
from paceline.data.source import BLOCK, blocks_between, digest_of
from paceline.ledger.records import SourceBlock

BLOCKS_KNOWN = 8
BLOCKS_HELD = 2  # a group may lie in two


class Mixture:
    """The samples of several sources. Their ids begin with the number of their source, from 1 on."""

    starts: Sequence[int] = (0,)

    def __init__(self, sources: Sequence[Dataset], weights: Sequence[float], seed: int) -> None:
        self.sources = list(sources)
        self._seed = seed
        self._weights = list(weights)
        self._counts = [max(1, round(w * s.size)) for s, w in zip(sources, weights, strict=True)]
        self._num_blocks = math.ceil(sum(self._counts) / BLOCK)
        self._order = lru_cache(BLOCKS_KNOWN)(self._shuffled)
        self._held: dict[int, list[Prompt]] = {}
        self._next = 0  # the ordinal after those that were read last

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    @property
    def size(self) -> int:
        return sum(self._counts)

    @property
    def has_chats(self) -> bool:
        return any(source.has_chats for source in self.sources)

    @property
    def longest(self) -> Sequence[int]:
        lengths = [
            [(size, number, place) for size, place in source.index.longest]
            for number, source in enumerate(self.sources)
        ]
        longest = heapq.merge(*lengths, key=lambda entry: entry[0], reverse=True)
        turns = ((number, self._turn_of(number, place)) for _, number, place in longest)
        found = (self._ordinal(number, turn) for number, turn in turns if turn is not None)
        return list(islice(found, LONGEST_KEPT // 4))

    @property
    def notes(self) -> list[str]:
        told = [f"{source.name}: {note}" for source in self.sources for note in source.notes]
        for source, count in zip(self.sources, self._counts, strict=True):
            told.append(f"a round takes {count} samples of {source.name}, which has {source.size}")
        return told

    def read(self, first: int, count: int) -> list[Prompt]:
        """Raises ConfigError if a source has changed since it was scanned.

        A sample that is looked up alone is read alone; anything else reads its whole blocks.
        """
        found: list[Prompt] = []
        end = min(first + count, self.size)
        is_lone, self._next = count == 1 and first != self._next, end
        while (ordinal := first + len(found)) < end:
            number = self._block_of(ordinal)
            place = ordinal - self._start(number)
            part = slice(place, place + end - ordinal)
            if is_lone and number not in self._held:
                found += [self._prompt(*turn) for turn in self._order(number)[part]]
            else:
                found += self._block(number)[part]
        return found

    def digests(self, count: int) -> list[str]:  # noqa: ARG002 (a mixture is known as a whole)
        """First one of sizes, weights and seed, then one of each source."""
        sizes = json.dumps([[source.size for source in self.sources], self._weights, self._seed])
        parts = ["".join(source.digests(source.size)) for source in self.sources]
        return [hashlib.sha256(part.encode()).hexdigest()[:16] for part in (sizes, *parts)]

    def blocks(self, bounds: Sequence[int] = ()) -> list[SourceBlock]:
        return blocks_between(bounds, self.size, lambda first, count: digest_of(self.read(first, count)))

    def difference(self, known: Sequence[str], size: int) -> str:
        """How the mixture differs from one of `size` samples and digests `known`, in words."""
        now = self.digests(size)
        if now[0] != known[0] or len(now) != len(known):
            return "the number, sizes or weights of the sources, or run.seed, are others"
        other = [s.name for s, a, b in zip(self.sources, now[1:], known[1:], strict=True) if a != b]
        return f"the content of {', '.join(other)} is another"

    # -- the order -----------------------------------------------------------------------------

    def _start(self, block: int) -> int:
        return sum(self._first(source, block) for source in range(len(self.sources)))

    def _first(self, source: int, block: int) -> int:
        """The source's first turn in the block: each block has an equal share of every source."""
        return block * self._counts[source] // self._num_blocks

    def _block_of(self, ordinal: int) -> int:
        return bisect_right(range(self._num_blocks), ordinal, key=self._start) - 1

    def _shuffled(self, block: int) -> list[tuple[int, int]]:
        """The block's turns, as (source, turn of that source), in the order of a keyed digest."""
        turns = [
            (source, turn)
            for source in range(len(self.sources))
            for turn in range(self._first(source, block), self._first(source, block + 1))
        ]
        return sorted(turns, key=lambda turn: hashlib.sha256(f"{self._seed}:{turn}".encode()).digest())

    def _ordinal(self, source: int, turn: int) -> int:
        block = bisect_right(range(self._num_blocks), turn, key=lambda b: self._first(source, b)) - 1
        return self._start(block) + self._order(block).index((source, turn))

    def _place_of(self, source: int, turn: int) -> tuple[int, int]:
        """Which time the source is gone through, from 0, and the place in it. The last time may skip some."""
        size, count = self.sources[source].size, self._counts[source]
        time, place = divmod(turn, size)
        last = min(size, count - time * size)
        return time, place * size // last

    def _turn_of(self, source: int, place: int) -> int | None:
        """The first turn of the sample at this place of the source; None if it has none."""
        size, count = self.sources[source].size, self._counts[source]
        turn = -(-place * min(size, count) // size)
        return turn if turn < count and self._place_of(source, turn) == (0, place) else None

    def _block(self, number: int) -> list[Prompt]:
        """The block's samples. Each source is read in its own order, so a record is parsed once."""
        if number not in self._held:
            if len(self._held) == BLOCKS_HELD:
                del self._held[next(iter(self._held))]
            order = self._order(number)
            prompts = {turn: self._prompt(*turn) for turn in sorted(order)}
            self._held[number] = [prompts[turn] for turn in order]
        return self._held[number]

    def _prompt(self, source: int, turn: int) -> Prompt:
        time, place = self._place_of(source, turn)
        [prompt] = self.sources[source].read(place, 1)
        name = f"{source + 1}.{time}" if time else f"{source + 1}"
        return replace(prompt, prompt_id=f"{name}:{prompt.prompt_id}", round=time)
