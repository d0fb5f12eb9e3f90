"""The consumer's waiting for its producer: measured, reported, and ended by a stop or an interruption."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from paceline.telemetry import BlockedTime


class Waiting:
    """`interrupted`: the producer is gone and did not end the stream, so no new sample will come."""

    def __init__(
        self,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_wait: Callable[[], None] = lambda: None,
        report: Callable[..., None] = lambda *_, **__: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`on_wait` is called before each wait, to do what the producer may be waiting for."""
        self.should_stop = should_stop
        self.interrupted = False
        self.clock = clock
        self.blocked = BlockedTime(report, clock)
        self._on_wait = on_wait

    def begin(self) -> None:
        """Call before each wait."""
        self.blocked.waiting()
        self._on_wait()
