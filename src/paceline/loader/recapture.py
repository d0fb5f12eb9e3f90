"""Recapture: if a sample's features are gone or damaged, the producer captures its prompt again.

The sample keeps its ordinal and its place in the plan; only its ref changes.
"""

from __future__ import annotations

from collections.abc import Callable

from paceline.errors import StoreError
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.records import State
from paceline.loader.waiting import Waiting
from paceline.types import SampleRef

WAIT_S = 1.0


class StoppedError(Exception):
    """The consumer was asked to stop while it waited for a sample."""


class QuarantinedError(Exception):
    """The sample that the consumer waited for is quarantined."""

    def __init__(self, sample_id: str) -> None:
        super().__init__(sample_id)
        self.sample_id = sample_id


class Recapture:
    def __init__(
        self, session: ConsumerSession, waiting: Waiting, report: Callable[..., None], timeout_s: float
    ) -> None:
        """`timeout_s`: how long to wait for one sample."""
        self._session = session
        self._waiting = waiting
        self._report = report
        self._timeout_s = timeout_s

    def wait_for(self, tried: SampleRef, cause: str) -> SampleRef:
        """Report the sample lost, unless it is known to be, and wait for its new ref.

        Raises StoppedError, QuarantinedError, or StoreError if no producer captures it in time.
        """
        with self._waiting.blocked:
            return self._wait_for(tried, cause)

    def _wait_for(self, tried: SampleRef, cause: str) -> SampleRef:
        session, waiting = self._session, self._waiting
        deadline = waiting.clock() + self._timeout_s
        reported = False
        while True:
            mark, interrupted = session.lsn(), waiting.interrupted
            # A successor may have trained and freed the sample: then no producer will capture it again.
            session.refuse_if_replaced()
            record = session.find([tried.sample_id])[tried.sample_id]
            if record.state == State.QUARANTINED:
                raise QuarantinedError(tried.sample_id)
            if record.ref != tried and record.state == State.PRESENT:
                return record.ref
            if record.state != State.LOST and not reported:
                session.report_lost([tried.sample_id])
                reported = True
                self._report("waiting_for_recapture", sample_id=tried.sample_id, cause=cause)
                continue
            if waiting.should_stop():
                raise StoppedError
            if interrupted or waiting.clock() > deadline:
                break
            waiting.begin()
            session.wait(mark, WAIT_S)
        raise StoreError(
            f"The features of {tried.sample_id} are gone and were not captured again ({cause})",
            why="The sample is committed, so it must be trained later; no weights were changed.",
            next="run the same command again; `paceline produce RUN.yaml` captures it.",
        )
