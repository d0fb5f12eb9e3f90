"""The lengths by which a step is cut to a budget of tokens: those that the log has on record.

The ref of a sample says how many tokens the target processed. A ledger that was rolled forward to a
checkpoint may know a sample by its id alone; it is lost then, and its length is known once it is captured
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from paceline.errors import ConfigError
from paceline.ledger.records import Entry, State
from paceline.loader.packing import packed
from paceline.loader.passes import Cut, Visit
from paceline.types import SampleRef


class StoppedError(Exception):
    """The consumer was asked to stop while it waited for a sample."""


class QuarantinedError(Exception):
    """The sample that the consumer waited for is quarantined."""

    def __init__(self, sample_id: str) -> None:
        super().__init__(sample_id)
        self.sample_id = sample_id


class Lengths:
    def __init__(self, captured_again: Callable[[SampleRef, str], SampleRef]) -> None:
        """`captured_again`: see `StepLoader`."""
        self._captured_again = captured_again
        self._learned: dict[str, int] = {}

    def known(self, entry: Entry) -> int | None:
        """The tokens of a sample; None if they are not known now."""
        return entry.ref.num_tokens or self._learned.get(entry.sample_id)

    def learn(self, entry: Entry) -> int:
        """The tokens of a sample, once it is captured again if need be; 0 for one that never will be.

        Raises ConfigError for a ref without a length, and what `captured_again` raises, but not
        QuarantinedError.
        """
        known = self.known(entry)
        if known is None:
            known = self._learned[entry.sample_id] = self._length_of(entry)
        return known

    def _length_of(self, entry: Entry) -> int:
        ref = entry.ref
        if entry.state == State.LOST:
            try:
                ref = self._captured_again(ref, "only its id is on record")
            except QuarantinedError:
                return 0
        elif entry.state == State.QUARANTINED:
            return 0
        if not ref.num_tokens:
            raise ConfigError(
                f"The ref of {entry.sample_id} does not say how many tokens the sample has.",
                why="training.tokens_per_step cuts a step by the lengths of its samples.",
                next="give num_tokens in the SampleRef, or set training.batch_size instead.",
            )
        return ref.num_tokens


def by_tokens(budget: int, length: Callable[[Entry], int | None]) -> Cut[Entry]:
    """Steps of at most `budget` tokens, or of one longer sample. A visit without a known length ends them."""

    def cut(ready: Sequence[Visit[Entry]]) -> int | None:
        read = 0

        def lengths() -> Iterator[int]:
            nonlocal read
            for visit in ready:
                known = length(visit.item)
                if known is None:
                    return
                read += 1
                yield known

        count = packed(lengths(), budget)
        return read if count is None and read < len(ready) else count

    return cut
