"""Which of the next samples make one optimizer step, or one part of it, by their tokens.

All functions are pure and know only sizes: so a step's samples follow from the log alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise


def packed(sizes: Iterable[int], budget: int) -> int | None:
    """How many samples, from the first, fill a budget of tokens; None if all of these leave room.

    A sample that no longer fits begins the next pack. One that is larger than the budget is alone in its
    own. `sizes` is read no further than needed.
    """
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if total > budget and count:
            return count
        if total >= budget:
            return count + 1
    return None


def packs(sizes: Sequence[int], budget: int) -> list[slice]:
    """All samples as consecutive packs; the last one may leave room."""
    found, start = [], 0
    while start < len(sizes):
        count = packed(sizes[start:], budget)
        stop = len(sizes) if count is None else start + count
        found.append(slice(start, stop))
        start = stop
    return found


def shares(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """`count` consecutive parts (start, stop) of about the same number of tokens.

    No part is empty if there are enough samples. A sample of size 0 counts as 1.
    """
    sums = [0, *accumulate(max(1, size) for size in sizes)]
    bounds = [0]
    for rank in range(1, count):
        wanted, least = sums[-1] * rank / count, bounds[-1] + 1
        most = max(least, len(sizes) - (count - rank))
        bounds.append(min(range(least, most + 1), key=lambda end: abs(sums[min(end, len(sizes))] - wanted)))
    ends = [min(bound, len(sizes)) for bound in [*bounds, len(sizes)]]
    return list(pairwise(ends))
