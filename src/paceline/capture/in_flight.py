"""The capture groups that the engine works on at the same time, up to a limit.

With a limit of one, a group is captured at once on the caller's thread; otherwise each group has a thread of
its own. Everything else (leases, reservations, puts, commits) stays on the caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from paceline.capture.encoding import EncodedPrompt
from paceline.capture.first_answers import CapturedPrompt
from paceline.capture.groups import CaptureGroup

Answer = Callable[[Sequence[EncodedPrompt]], list[CapturedPrompt]]


@dataclass(frozen=True)
class CaptureInFlight:
    """A group that is being captured, and the generations reserved for its wanted samples."""

    group: CaptureGroup
    generations: Mapping[str, int]
    began_at: float
    future: Future[list[CapturedPrompt]] = field(default_factory=Future)


class CapturesInFlight:
    def __init__(self, answer: Answer, most: int) -> None:
        self._answer = answer
        self._most = most
        self._executor = ThreadPoolExecutor(most, "paceline-capture") if most > 1 else None
        self._in_flight: list[CaptureInFlight] = []

    def __len__(self) -> int:
        return len(self._in_flight)

    @property
    def has_room(self) -> bool:
        return len(self._in_flight) < self._most

    @property
    def groups(self) -> list[CaptureGroup]:
        return [capture.group for capture in self._in_flight]

    def begin(self, capture: CaptureInFlight) -> None:
        self._in_flight.append(capture)
        if self._executor is None:
            self._run(capture)
        else:
            self._executor.submit(self._run, capture)

    def first_done(self) -> CaptureInFlight:
        """Wait until a capture ends; if several have, the one that began first."""
        wait([capture.future for capture in self._in_flight], return_when=FIRST_COMPLETED)
        done = next(capture for capture in self._in_flight if capture.future.done())
        self._in_flight.remove(done)
        return done

    def close(self) -> list[CaptureInFlight]:
        """Wait for the captures still in flight, and return them."""
        if self._executor is not None:
            self._executor.shutdown()
        left, self._in_flight = self._in_flight, []
        return left

    def _run(self, capture: CaptureInFlight) -> None:
        try:
            capture.future.set_result(self._answer(capture.group.members))
        except BaseException as error:
            capture.future.set_exception(error)
            if self._executor is None and not isinstance(error, Exception):
                raise  # such an error ends the process
