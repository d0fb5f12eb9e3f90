"""From the committed log to the tensors of one optimizer step.

The loader takes refs in seq order (each as often as the run's passes say, see passes.py), has the
step's plan written before anything is computed, and fetches and verifies the features. A feature
that is gone or damaged is a cache miss: the loader reports it lost, the producer captures its prompt
again under the same ordinal, and the step goes on with the same samples in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from paceline.errors import FeatureCorruptError, FeatureMissingError, LedgerError, StoreError
from paceline.features.store import FeatureStore
from paceline.ledger.channel import CommittedRefLog, StreamingRefQueue
from paceline.ledger.controller import DataFlowController
from paceline.loader.passes import START, Position, VisitOrder
from paceline.types import SampleRef

WAIT_S = 1.0


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: its samples in plan order and the tensors of each.

    `finished` are those whose last visit this is; `after` is where the run stands once it is done.
    """

    step: int
    refs: list[SampleRef]
    finished: list[SampleRef]
    after: Position
    last_seq: int
    samples: list[dict[str, Any]] = field(repr=False)
    wait_s: float = 0.0


class StepLoader:
    def __init__(
        self,
        controller: DataFlowController,
        features: FeatureStore,
        *,
        batch_size: int,
        passes: int = 1,
        block_size: int = 64,
        position: Position = START,
        should_stop: Callable[[], bool] = lambda: False,
        idle_timeout_s: float | None = None,
        report: Callable[..., None] = lambda *_, **__: None,
        recapture_timeout_s: float = 1800.0,
    ) -> None:
        """`position`: what the weights already contain; see passes.py for passes and blocks."""
        self.on_wait: Callable[[], None] = lambda: None
        self._controller = controller
        self._features = features
        self._batch_size = batch_size
        self._should_stop = should_stop
        self._interrupted = False
        self.exhausted = False  # whether every visit of a stream that ended has been planned
        self._recapture_timeout_s = recapture_timeout_s
        self._report = report
        self._order: VisitOrder[SampleRef] = VisitOrder(
            passes=passes, block_size=block_size, position=position
        )
        self._last_seq = VisitOrder.first_block(position, passes) * block_size
        self._log = CommittedRefLog(controller.store, after_seq=self._last_seq)
        self._queue = StreamingRefQueue(
            self._log,
            poll_s=WAIT_S,
            idle_timeout_s=idle_timeout_s,
            should_stop=should_stop,
            on_wait=lambda: self.on_wait(),
        )

    def next_step(self, step: int) -> PlannedStep | None:
        """Plan and fetch `step`; None at the end of the stream or when asked to stop.

        The last step may have fewer samples: the tail is trained, not dropped. Raises LedgerError
        if a replayed step would differ from its plan.
        """
        if self._should_stop():
            return None
        started = monotonic()
        on_record = self._controller.store.get_plan(step)
        size = self._batch_size if on_record is None else len(on_record.sample_ids)
        visits = self._order.visits(size, self._read_block)
        if not visits:
            self.exhausted = visits is not None
            return None
        refs = [visit.item for visit in visits]
        plan = self._controller.plan_step(step, refs, self._last_seq)
        if plan.sample_ids != tuple(ref.sample_id for ref in refs):
            raise LedgerError(
                f"Step {step} was planned as {list(plan.sample_ids)} but the log now gives "
                f"{[ref.sample_id for ref in refs]}.",
                why="Training other samples than planned would break the guarantee of equal weights.",
                next="report this with the run's ledger.db; nothing was trained.",
            )
        try:
            refs, samples = self.fetch(refs)
        except _StoppedError:
            self._order.put_back(visits)
            return None  # the plan is on record and will be replayed
        return PlannedStep(
            step,
            refs,
            finished=[ref for ref, visit in zip(refs, visits, strict=True) if visit.is_last],
            after=visits[-1].after,
            last_seq=self._last_seq,
            samples=samples,
            wait_s=monotonic() - started,
        )

    def _read_block(self, size: int) -> Sequence[SampleRef] | None:
        """The next block of the log; a short one only at the true end of the stream."""
        refs = self._queue.get(size)
        if len(refs) < size and not self._queue.ended:
            return None
        for ref in refs:
            self._last_seq = self._log.take_seq(ref.sample_id)
        return refs

    def ack(self, planned: PlannedStep) -> None:
        self._queue.ack(planned.finished)

    def interrupt(self) -> None:
        """The producer is gone and did not close the stream: whole steps are trained, the rest waits."""
        self._interrupted = True
        self._queue.interrupt()

    def rearm(self) -> None:
        """A producer is back."""
        self._interrupted = False
        self._queue.rearm()

    def first_samples(self, count: int) -> list[dict[str, Any]]:
        """The tensors of the first `count` samples of the run (fewer if it has fewer). Waits for them."""
        store = self._controller.store
        while not self._should_stop():
            mark, ended = store.lsn(), self._log.is_closed()
            interrupted = self._interrupted
            entries = store.read_committed(0, count)
            if interrupted and len(entries) < count:
                break
            if len(entries) == count or ended:
                try:
                    return self.fetch([entry.ref for entry in entries])[1]
                except _StoppedError:
                    break
            store.wait(mark, WAIT_S)
        return []

    def fetch(self, refs: list[SampleRef]) -> tuple[list[SampleRef], list[dict[str, Any]]]:
        """Verified tensors of each ref, captured again where they are gone; the refs now valid."""
        current, samples = list(refs), []
        for index in range(len(current)):
            deadline = monotonic() + self._recapture_timeout_s
            while True:
                try:
                    samples.append(self._features.get(current[index]))
                    break
                except (FeatureMissingError, FeatureCorruptError) as error:
                    current[index] = self._recaptured(current[index], deadline, error)
        return current, samples

    def _recaptured(self, tried: SampleRef, deadline: float, cause: StoreError) -> SampleRef:
        """Report the sample lost, unless that is known already, and wait for its new ref."""
        store = self._controller.store
        reported = False
        while True:
            mark, interrupted = store.lsn(), self._interrupted
            known = store.get_committed(tried.sample_id)
            lost = tried.sample_id in store.lost_ids()
            if known is not None and known != tried and not lost:
                return known
            if not lost and not reported:
                store.report_lost([tried.sample_id], fence=self._controller.fence("consumer"))
                reported = True
                self._report("waiting_for_recapture", sample_id=tried.sample_id, cause=cause.what)
                continue
            if self._should_stop():
                raise _StoppedError
            if interrupted or monotonic() > deadline:
                break  # nobody is there to capture it
            self.on_wait()
            store.wait(mark, WAIT_S)
        raise StoreError(
            f"The features of {tried.sample_id} are gone and were not captured again ({cause.what})",
            why="The sample is committed, so it is trained later; no weights were changed.",
            next="run the same command again; `paceline produce RUN.yaml` captures it.",
        ) from cause


class _StoppedError(Exception):
    """Asked to stop while waiting for a sample to be captured again."""
