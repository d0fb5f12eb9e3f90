"""How far a run is, where the number of its steps is unknown: the share of its visits that are made.

It follows from a position in the order of visits and from the number of prompts, so a resumed run knows it
without a count of its own. Prompts that fail count as if they had been visited.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.loader.passes import Position


def share_of_visits(
    blocks: Sequence[range], position: Position, *, passes: int, ends: Sequence[int]
) -> float:
    """The share of all visits that lie before `position`.

    `blocks`: the places of the blocks that the position's stage visits, oldest first. `ends`: the number of
    places at each extension of the run, and now. A position up to an extension has its share of the run as it
    was before, so that an extension changes no earlier step.
    """
    made = sum(min(block.start, ends[-1]) for block in blocks)
    inside = sum(max(0, min(block.stop, ends[-1]) - block.start) for block in blocks)
    made += min(position.offset, inside)
    total = next(passes * end for end in ends if made <= passes * end)
    return made / total if total else 1.0
