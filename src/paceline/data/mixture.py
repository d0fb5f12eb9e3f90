"""Mixture: several sources in one order, which follows from their sizes, their weights and the run's seed.

A round takes `weight` times the size of a source of it: of weight 2 each sample twice, of 0.5 every second
one. Samples that are added to the sources of a complete run come after all that the run has, in an order of
their own: so no sample changes its ordinal, and the whole order follows from the sizes at each extension.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise

from paceline.data.dataset import Dataset
from paceline.data.index import LONGEST_KEPT
from paceline.data.interleaving import Interleaving
from paceline.data.prompts import Prompt
from paceline.data.source import Stretch, blocks_between, digest_of
from paceline.ledger.records import SourceBlock

BLOCKS_KNOWN = 8
BLOCKS_HELD = 2  # a group may lie in two


@dataclass(frozen=True)
class _Addition:
    """Samples that came together. `begin`: their first ordinal; `first`: the first place in each source."""

    begin: int
    first: Sequence[int]
    order: Interleaving


class Mixture:
    """The samples of several sources. Their ids begin with the number of their source, from 1 on."""

    starts: Sequence[int] = (0,)

    def __init__(
        self,
        sources: Sequence[Dataset],
        weights: Sequence[float],
        seed: int,
        stretches: Sequence[Sequence[int]] = (),
    ) -> None:
        """`stretches`: the sizes that the sources had at the run's first start and after each extension."""
        self.sources = list(sources)
        self._seed = seed
        self._weights = list(weights)
        self._sizes = list(stretches) or [self.stretch]
        self.ends = [sum(self._counts(sizes)) for sizes in self._sizes]  # of the stretches, in samples
        self._additions = [
            self._addition(begin, before, now)
            for begin, (before, now) in zip([0, *self.ends], pairwise([(), *self._sizes]), strict=False)
        ]
        self._turns = lru_cache(BLOCKS_KNOWN)(
            lambda number, block: self._additions[number].order.turns(block)
        )
        self._held: dict[tuple[int, int], list[Prompt]] = {}
        self._next = 0  # the ordinal after those that were read last

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    @property
    def size(self) -> int:
        return self.ends[-1]

    @property
    def stretch(self) -> list[int]:
        """The sizes of the sources."""
        return [source.size for source in self.sources]

    def grown(self, stretches: Sequence[Stretch]) -> Mixture:
        """The same sources in the order of a run that has grown so. (Earlier versions recorded a number.)"""
        sizes = [self.stretch if isinstance(stretch, int) else stretch for stretch in stretches]
        return Mixture(self.sources, self._weights, self._seed, sizes)

    @property
    def has_chats(self) -> bool:
        return any(source.has_chats for source in self.sources)

    @property
    def longest(self) -> Sequence[int]:
        """Of the samples that were there first."""
        lengths = [
            [(size, number, place) for size, place in source.index.longest if place < first]
            for number, (source, first) in enumerate(zip(self.sources, self._sizes[0], strict=False))
        ]
        longest = heapq.merge(*lengths, key=lambda entry: entry[0], reverse=True)
        order = self._additions[0].order
        found = (order.ordinal_of(number, place) for _, number, place in longest)
        return list(islice((ordinal for ordinal in found if ordinal is not None), LONGEST_KEPT // 4))

    @property
    def notes(self) -> list[str]:
        told = [f"{source.name}: {note}" for source in self.sources for note in source.notes]
        for source, count in zip(self.sources, self._counts(self.stretch), strict=True):
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
            number = bisect_right(self.ends, ordinal)
            order, offset = self._additions[number].order, ordinal - self._additions[number].begin
            block = order.block_of(offset)
            place = offset - order.start(block)
            part = slice(place, place + end - ordinal)
            if is_lone and (number, block) not in self._held:
                found += [self._prompt(number, *turn) for turn in self._turns(number, block)[part]]
            else:
                found += self._block(number, block)[part]
        return found

    def digests(self, count: int) -> list[str]:
        """First one of sizes, weights and seed, then one of each source, of the first `count` samples.

        `count`: where a stretch ends.
        """
        now = self._sizes[self.ends.index(count)]
        sizes = json.dumps([now, self._weights[: len(now)], self._seed])
        parts = ["".join(s.digests(size)) for s, size in zip(self.sources, now, strict=False)]
        return [hashlib.sha256(part.encode()).hexdigest()[:16] for part in (sizes, *parts)]

    def blocks(self, bounds: Sequence[int] = ()) -> list[SourceBlock]:
        return blocks_between(bounds, self.size, lambda first, count: digest_of(self.read(first, count)))

    def difference(self, known: Sequence[str], size: int) -> str:
        """How the mixture differs from one of `size` samples and digests `known`, in words."""
        now = self.digests(size)
        if now[0] != known[0] or len(now) != len(known):
            return "the number, sizes or weights of the sources, or run.seed, are others"
        other = [s.name for s, a, b in zip(self.sources, now[1:], known[1:], strict=False) if a != b]
        return f"the content of {', '.join(other)} is another"

    def _counts(self, sizes: Sequence[int]) -> list[int]:
        """How many samples a round takes of sources of these sizes."""
        return [max(1, round(w * size)) if size else 0 for size, w in zip(sizes, self._weights, strict=False)]

    def _addition(self, begin: int, before: Sequence[int], now: Sequence[int]) -> _Addition:
        first = [*before, *[0] * (len(now) - len(before))]
        sizes = [size - earlier for size, earlier in zip(now, first, strict=False)]
        pairs = zip(self._counts(now), self._counts(first), strict=True)
        return _Addition(
            begin, first, Interleaving(sizes, [count - earlier for count, earlier in pairs], self._seed)
        )

    def _block(self, number: int, block: int) -> list[Prompt]:
        """The block's samples. Each source is read in its own order, so a record is parsed once."""
        key = number, block
        if key not in self._held:
            if len(self._held) == BLOCKS_HELD:
                del self._held[next(iter(self._held))]
            order = self._turns(number, block)
            prompts = {turn: self._prompt(number, *turn) for turn in sorted(order)}
            self._held[key] = [prompts[turn] for turn in order]
        return self._held[key]

    def _prompt(self, number: int, source: int, turn: int) -> Prompt:
        addition = self._additions[number]
        time, place = addition.order.place_of(source, turn)
        [prompt] = self.sources[source].read(addition.first[source] + place, 1)
        name = f"{source + 1}.{time}" if time else f"{source + 1}"
        return replace(prompt, prompt_id=f"{name}:{prompt.prompt_id}", round=time)
