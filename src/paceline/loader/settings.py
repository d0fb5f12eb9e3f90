"""The settings that decide a run's plans, and how far a run is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.loader.passes import Position, VisitOrder
from paceline.loader.progress import share_of_visits
from paceline.target.version import TargetVersion


@dataclass(frozen=True)
class LoaderSettings:
    """The settings that decide the plans (passes.py explains passes and blocks), and the loader's timeouts.

    `starts`: the places at which prompts were added to a complete run; a block begins at each.
    `tokens_per_step`: a step is as many visits as hold at most so many tokens, instead of `batch_size`;
    then `size` is the number of places that the log will have, None if it has no end.
    """

    batch_size: int
    passes: int = 1
    block_size: int = 64
    starts: Sequence[int] = (0,)
    idle_timeout_s: float | None = None
    recapture_timeout_s: float = 1800.0
    target: TargetVersion | None = None  # only its samples may be planned; None: any
    tokens_per_step: int | None = None
    size: int | None = None

    def block(self, number: int) -> range:
        """The places of a block of the log.

        After the end of a run that was extended, `passes` - 1 empty blocks follow, in which the blocks
        before them had their last visits.
        """
        begin = 0
        for bound in (start for start in self.starts if start > 0):
            blocks = -(-(bound - begin) // self.block_size)
            if number < blocks:
                first = begin + number * self.block_size
                return range(first, min(first + self.block_size, bound))
            number -= blocks
            if number < self.passes - 1:
                return range(bound, bound)
            number, begin = number - (self.passes - 1), bound
        first = begin + number * self.block_size
        return range(first, first + self.block_size)

    def first_place(self, position: Position) -> int:
        """Where a consumer that resumes at `position` begins to read the log."""
        return self.block(VisitOrder.first_block(position, self.passes)).start

    def progress(self, position: Position) -> float | None:
        """The share of the run's visits before `position`; None if steps count samples, or without an end."""
        if self.tokens_per_step is None or self.size is None:
            return None
        first = VisitOrder.first_block(position, self.passes)
        blocks = [self.block(number) for number in range(first, position.stage + 1)]
        ends = [*(start for start in self.starts if start > 0), self.size]
        return share_of_visits(blocks, position, passes=self.passes, ends=ends)
