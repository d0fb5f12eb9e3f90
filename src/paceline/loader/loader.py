"""From the committed log to the tensors of one optimizer step.

The loader takes refs in seq order (each as often as the run's passes say, see passes.py), has the
step's plan written before anything is computed, and fetches and verifies the features. A feature
that is gone or damaged is a cache miss: the loader reports it lost, the producer captures its prompt
again under the same ordinal, and the step goes on with the same samples in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from paceline.errors import FeatureCorruptError, FeatureMissingError, LedgerError, StoreError
from paceline.features.store import FeatureStore
from paceline.ledger.channel import CommittedRefLog, StreamingRefQueue
from paceline.ledger.controller import DataFlowController
from paceline.ledger.records import BegunStep, CommittedRef, StepPlan, TrainedSample, TrainedStep
from paceline.loader.passes import START, Position, Visit, VisitOrder
from paceline.loader.read_ahead import ReadAhead
from paceline.telemetry import BlockedTime
from paceline.types import SampleRef

WAIT_S = 1.0
RECAPTURES_MAX = 5  # of one sample in one step, before it is put in quarantine
Visits = list[Visit[CommittedRef]]


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: its samples in plan order and the tensors of each.

    `visits` belong to `samples`; `after` is where the run stands once the step is done; `deaths` counts
    consumers that died in it.
    """

    step: int
    rev: int
    deaths: int
    visits: Visits
    after: Position
    last_seq: int
    samples: list[dict[str, Any]] = field(repr=False)
    wait_s: float = 0.0

    @property
    def refs(self) -> list[SampleRef]:
        return [visit.item.ref for visit in self.visits]

    @property
    def finished(self) -> list[SampleRef]:
        """Those whose last visit this is."""
        return [visit.item.ref for visit in self.visits if visit.is_last]

    @property
    def trained(self) -> TrainedStep:
        """The step as a checkpoint's lineage keeps it."""
        samples = [
            TrainedSample(v.item.seq, v.item.ref.sample_id, v.item.ref.source_task_id, v.is_last)
            for v in self.visits
        ]
        return TrainedStep(self.step, self.rev, self.last_seq, tuple(samples))


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
        executor: Executor | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`position`: what the weights already contain; see passes.py for passes and blocks.

        `executor`: reads the next step's features while the current one trains; None: nobody does.
        """
        self.on_wait: Callable[[], None] = lambda: None
        self._controller = controller
        self._ahead = ReadAhead(features.get, executor)
        self._batch_size = batch_size
        self._should_stop = should_stop
        self._interrupted = False
        self.exhausted = False  # whether every visit of a stream that ended has been planned
        self._recapture_timeout_s = recapture_timeout_s
        self._report = report
        self._clock = clock
        self.blocked = BlockedTime(report, clock)
        self._order: VisitOrder[CommittedRef] = VisitOrder(
            passes=passes, block_size=block_size, position=position
        )
        self._next_block = VisitOrder.first_block(position, passes)
        self._block_ends = {self._next_block - 1: self._next_block * block_size}  # the last seq of each
        self._log = CommittedRefLog(controller.store, after_seq=self._next_block * block_size)
        self._queue = StreamingRefQueue(
            self._log,
            poll_s=WAIT_S,
            idle_timeout_s=idle_timeout_s,
            should_stop=should_stop,
            on_wait=self._before_wait,
            clock=clock,
        )

    def _before_wait(self) -> None:
        self.blocked.waiting()
        self.on_wait()

    def next_step(self, step: int) -> PlannedStep | None:
        """Plan and fetch `step`; None at the end of the stream or when asked to stop.

        The last step may have fewer samples: the tail is trained, not dropped. Raises LedgerError
        if a replayed step would differ from its plan.
        """
        if self._should_stop():
            return None
        started = self._clock()
        taken = self._order.visits(self._batch_size, self._read_block)
        if not taken:
            self.exhausted = taken is not None
            return None
        quarantined = self._controller.store.quarantined([visit.item.ref.sample_id for visit in taken])
        on_record = self._controller.store.get_plan(step)
        if on_record is None:
            visits = [visit for visit in taken if visit.item.ref.sample_id not in quarantined]
            plan = _plan(step, visits, self._read_up_to(taken[-1].stage))
        else:
            visits, rest = _as_planned(on_record, taken, quarantined)
            plan, taken = on_record, taken[: len(taken) - len(rest)]
            self._order.put_back(rest)
        begun = self._controller.begin_step(plan)
        if begun.plan.sample_ids != plan.sample_ids:
            raise _differs(begun.plan, plan.sample_ids)
        planned = self._fetched(begun, visits, taken, started)
        following = self._order.look_ahead(self._batch_size, self._read_block_if_there)
        self._ahead.start([visit.item.ref for visit in following])
        return planned

    def _read_up_to(self, stage: int) -> int:
        """The last seq of the newest block that the stage visits: where the log has been read up to."""
        newest = max(block for block in self._block_ends if block <= stage)
        self._block_ends = {block: end for block, end in self._block_ends.items() if block >= newest}
        return self._block_ends[newest]

    def _fetched(self, begun: BegunStep, visits: Visits, taken: Visits, started: float) -> PlannedStep | None:
        """The step with its tensors, less what can never be fetched; None if asked to stop."""
        plan = begun.plan
        while True:
            try:
                refs, samples = self.fetch([visit.item.ref for visit in visits])
                break
            except (_StoppedError, StoreError) as error:
                self._order.put_back(taken)
                self._controller.leave_step(plan.step)  # on record, to be replayed; nobody died in it
                if isinstance(error, StoreError):
                    raise
                return None
            except _GivenUpError as gone:
                visits = [v for v in visits if v.item.ref.sample_id != gone.sample_id]
                plan = replace(_plan(plan.step, visits, plan.last_seq), rev=plan.rev + 1)
                begun = self._controller.begin_step(plan)
        current = [replace(v, item=replace(v.item, ref=ref)) for v, ref in zip(visits, refs, strict=True)]
        seconds = self._clock() - started
        return PlannedStep(
            plan.step, plan.rev, begun.deaths, current, taken[-1].after, plan.last_seq, samples, seconds
        )

    def revise(self, planned: PlannedStep, poison: Collection[str]) -> PlannedStep:
        """The step without `poison`, which is in quarantine by now: a new revision of its plan."""
        kept = [
            (visit, sample)
            for visit, sample in zip(planned.visits, planned.samples, strict=True)
            if visit.item.ref.sample_id not in poison
        ]
        visits, samples = [visit for visit, _ in kept], [sample for _, sample in kept]
        plan = replace(_plan(planned.step, visits, planned.last_seq), rev=planned.rev + 1)
        self._controller.begin_step(plan)
        return replace(planned, rev=plan.rev, deaths=0, visits=visits, samples=samples)

    def _read_block(self, size: int) -> Sequence[CommittedRef] | None:
        """The next block of the log; a short one only at the true end of the stream."""
        with self.blocked:
            refs = self._queue.get(size)
        if len(refs) < size and not self._queue.ended:
            return None
        entries = [CommittedRef(self._log.take_seq(ref.sample_id), ref) for ref in refs]
        if entries:
            self._block_ends[self._next_block] = entries[-1].seq
            self._next_block += 1
        return entries

    def _read_block_if_there(self, size: int) -> Sequence[CommittedRef] | None:
        return self._read_block(size) if self._queue.has(size) else None

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

    def first_samples(self, count: int) -> tuple[list[SampleRef], list[dict[str, Any]]]:
        """The first `count` samples of the run (fewer if it has fewer) with their tensors. Waits for them.

        Those in quarantine are left out. Empty if asked to stop.
        """
        store = self._controller.store
        while not self._should_stop():
            mark, ended, interrupted = store.lsn(), self._log.is_closed(), self._interrupted
            entries = store.read_committed(0, count)
            if interrupted and len(entries) < count:
                break
            if len(entries) == count or ended:
                try:
                    return self.fetch([entry.ref for entry in entries if not entry.quarantined])
                except _StoppedError:
                    break
                except _GivenUpError:
                    continue
            with self.blocked:
                self.blocked.waiting()
                store.wait(mark, WAIT_S)
        return [], []

    def fetch(self, refs: list[SampleRef]) -> tuple[list[SampleRef], list[dict[str, Any]]]:
        """Verified tensors of each ref, captured again where they are gone; the refs now valid."""
        current, samples = list(refs), []
        for index in range(len(current)):
            deadline = self._clock() + self._recapture_timeout_s
            tries_left = RECAPTURES_MAX
            while True:
                try:
                    samples.append(self._ahead.get(current[index]))
                    break
                except (FeatureMissingError, FeatureCorruptError) as error:
                    tries_left -= 1
                    if tries_left < 0:
                        self._give_up(current[index], error)
                    with self.blocked:
                        current[index] = self._recaptured(current[index], deadline, error)
        return current, samples

    def _give_up(self, ref: SampleRef, cause: StoreError) -> None:
        reason = f"captured again {RECAPTURES_MAX} times and never readable: {cause.what}"
        self._controller.quarantine([ref.sample_id], step=None, reason=reason)
        self._report("quarantined", sample_id=ref.sample_id, message=reason)

    def _recaptured(self, tried: SampleRef, deadline: float, cause: StoreError) -> SampleRef:
        """Report the sample lost, unless that is known already, and wait for its new ref."""
        store = self._controller.store
        reported = False
        while True:
            mark, interrupted = store.lsn(), self._interrupted
            # A successor may have trained and freed the sample: then nobody will capture it again.
            store.refuse_if_replaced(self._controller.fence("consumer"))
            record, known = store.sample_record(tried.sample_id), store.get_committed(tried.sample_id)
            assert record is not None, "a planned sample is committed"
            if record.state == "quarantined":
                raise _GivenUpError(tried.sample_id)
            lost = record.state == "lost"
            if known is not None and known != tried and record.state == "present":
                return known
            if not lost and not reported:
                store.report_lost([tried.sample_id], fence=self._controller.fence("consumer"))
                reported = True
                self._report("waiting_for_recapture", sample_id=tried.sample_id, cause=cause.what)
                continue
            if self._should_stop():
                raise _StoppedError
            if interrupted or self._clock() > deadline:
                break  # nobody is there to capture it
            self._before_wait()
            store.wait(mark, WAIT_S)
        raise StoreError(
            f"The features of {tried.sample_id} are gone and were not captured again ({cause.what})",
            why="The sample is committed, so it is trained later; no weights were changed.",
            next="run the same command again; `paceline produce RUN.yaml` captures it.",
        ) from cause


def _plan(step: int, visits: Visits, last_seq: int) -> StepPlan:
    return StepPlan(step, tuple(visit.item.ref.sample_id for visit in visits), last_seq)


def _as_planned(plan: StepPlan, taken: Visits, quarantined: Collection[str]) -> tuple[Visits, Visits]:
    """The visits that a plan on record names, and those behind them that it does not reach.

    It may lack visits (poison), and end before the last of them: it was the stream's tail once.
    """
    chosen: Visits = []
    end = 0
    for place, visit in enumerate(taken, start=1):
        if visit.item.ref.sample_id in plan.sample_ids[len(chosen) : len(chosen) + 1]:
            chosen.append(visit)
        elif visit.item.ref.sample_id not in quarantined:
            break
        end = place
    if end == 0 or len(chosen) < len(plan.sample_ids):
        raise _differs(plan, [visit.item.ref.sample_id for visit in taken])
    return chosen, taken[end:]


def _differs(plan: StepPlan, now: Sequence[str]) -> LedgerError:
    return LedgerError(
        f"Step {plan.step} was planned as {list(plan.sample_ids)} but the log now gives {list(now)}.",
        why="Training other samples than planned would break the guarantee of equal weights.",
        next="run `paceline fsck RUN` and report this with its output; nothing was trained.",
    )


class _StoppedError(Exception):
    """Asked to stop while waiting for a sample to be captured again."""


class _GivenUpError(Exception):
    """The sample that was waited for is in quarantine."""

    def __init__(self, sample_id: str) -> None:
        super().__init__(sample_id)
        self.sample_id = sample_id
