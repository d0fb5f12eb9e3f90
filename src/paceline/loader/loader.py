"""From the committed log to the plan of one optimizer step after another.

The loader takes refs in seq order (each as often as the run's passes say, see passes.py) and has the
step's plan written before anything is computed. It reads no features: the ranks that train do
(training/worker.py). What cannot be read there is captured again (recapture.py), and the step goes on with
the same samples in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from paceline.errors import LedgerError
from paceline.ledger.channel import CommittedRefLog, StreamingRefQueue
from paceline.ledger.controller import DataFlowController
from paceline.ledger.records import CommittedRef, StepPlan, TrainedSample, TrainedStep
from paceline.loader.passes import START, Position, Visit, VisitOrder
from paceline.loader.recapture import WAIT_S, Recapture
from paceline.loader.waiting import Waiting
from paceline.types import SampleRef

Visits = tuple[Visit[CommittedRef], ...]


@dataclass(frozen=True)
class LoaderSettings:
    """What decides the plans (see passes.py for passes and blocks), and how long the loader waits."""

    batch_size: int
    passes: int = 1
    block_size: int = 64
    idle_timeout_s: float | None = None
    recapture_timeout_s: float = 1800.0


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: the refs of its samples, in plan order.

    `visits` are those that it trains, of the visits that it took; `deaths` counts consumers that died in it.
    """

    step: int
    rev: int
    deaths: int
    visits: Visits
    taken: Visits
    last_seq: int

    @property
    def refs(self) -> tuple[SampleRef, ...]:
        return tuple(visit.item.ref for visit in self.visits)

    @property
    def sample_ids(self) -> list[str]:
        return [visit.item.ref.sample_id for visit in self.visits]

    @property
    def finished(self) -> list[SampleRef]:
        """Those whose last visit this is."""
        return [visit.item.ref for visit in self.visits if visit.is_last]

    @property
    def after(self) -> Position:
        """Where the run stands once the step is done."""
        return self.taken[-1].after

    @property
    def trained(self) -> TrainedStep:
        """The step as a checkpoint's lineage keeps it."""
        samples = [
            TrainedSample(v.item.seq, v.item.ref.sample_id, v.item.ref.source_task_id, v.is_last)
            for v in self.visits
        ]
        return TrainedStep(self.step, self.rev, self.last_seq, tuple(samples))

    def with_refs(self, refs: Mapping[str, SampleRef]) -> PlannedStep:
        """The same step with the newest ref of each sample."""
        visits = tuple(replace(v, item=replace(v.item, ref=refs[v.item.ref.sample_id])) for v in self.visits)
        return replace(self, visits=visits)


class StepLoader:
    def __init__(
        self,
        controller: DataFlowController,
        settings: LoaderSettings,
        *,
        position: Position = START,
        should_stop: Callable[[], bool] = lambda: False,
        on_wait: Callable[[], None] = lambda: None,
        report: Callable[..., None] = lambda *_, **__: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`position`: what the weights already contain. `on_wait` is called before each wait for samples."""
        self._controller = controller
        self._batch_size = settings.batch_size
        self._waiting = Waiting(should_stop=should_stop, on_wait=on_wait, report=report, clock=clock)
        self.recapture = Recapture(controller, self._waiting, report, settings.recapture_timeout_s)
        self.exhausted = False  # whether every visit of a stream that ended has been planned
        passes, block_size = settings.passes, settings.block_size
        self._order: VisitOrder[CommittedRef] = VisitOrder(
            passes=passes, block_size=block_size, position=position
        )
        self._next_block = VisitOrder.first_block(position, passes)
        self._block_ends = {self._next_block - 1: self._next_block * block_size}  # the last seq of each
        self._log = CommittedRefLog(controller.store, after_seq=self._next_block * block_size)
        self._queue = StreamingRefQueue(
            self._log,
            poll_s=WAIT_S,
            idle_timeout_s=settings.idle_timeout_s,
            should_stop=should_stop,
            on_wait=self._waiting.begin,
            clock=clock,
        )

    @property
    def blocked_seconds(self) -> float:
        """How long this consumer has waited for its producer."""
        return self._waiting.blocked.seconds

    # -- plans -----------------------------------------------------------------------------

    def next_step(self, step: int) -> PlannedStep | None:
        """Plan `step`; None at the end of the stream or when asked to stop.

        The last step may have fewer samples: the tail is trained, not dropped. Raises LedgerError
        if a replayed step would differ from its plan.
        """
        if self._waiting.should_stop():
            return None
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
        return PlannedStep(step, plan.rev, begun.deaths, tuple(visits), tuple(taken), plan.last_seq)

    def _read_up_to(self, stage: int) -> int:
        """The last seq of the newest block that the stage visits: where the log has been read up to."""
        newest = max(block for block in self._block_ends if block <= stage)
        self._block_ends = {block: end for block, end in self._block_ends.items() if block >= newest}
        return self._block_ends[newest]

    def revise(self, planned: PlannedStep, quarantined: Collection[str]) -> PlannedStep:
        """The step without what is in quarantine by now: a new revision of its plan."""
        visits = tuple(v for v in planned.visits if v.item.ref.sample_id not in quarantined)
        plan = replace(_plan(planned.step, visits, planned.last_seq), rev=planned.rev + 1)
        begun = self._controller.begin_step(plan)
        return replace(planned, rev=plan.rev, deaths=begun.deaths, visits=visits)

    def leave(self, planned: PlannedStep) -> None:
        """The step is not trained now: it stays on record, to be replayed, and no consumer died in it."""
        self._order.put_back(list(planned.taken))
        self._controller.leave_step(planned.step)

    def following(self) -> list[SampleRef]:
        """The refs of the next step, as far as they are there already; nothing is planned."""
        visits = self._order.look_ahead(self._batch_size, self._read_block_if_there)
        return [visit.item.ref for visit in visits]

    # -- the stream ------------------------------------------------------------------------

    def _read_block(self, size: int) -> Sequence[CommittedRef] | None:
        """The next block of the log; a short one only at the true end of the stream."""
        with self._waiting.blocked:
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
        self._waiting.interrupted = True
        self._queue.interrupt()

    def rearm(self) -> None:
        """A producer is back."""
        self._waiting.interrupted = False
        self._queue.rearm()

    def first_refs(self, count: int) -> list[SampleRef] | None:
        """The first `count` samples of the run (fewer if it has fewer). Waits for them.

        Those in quarantine are left out. None if asked to stop.
        """
        store, waiting = self._controller.store, self._waiting
        while not waiting.should_stop():
            mark, ended, interrupted = store.lsn(), self._log.is_closed(), waiting.interrupted
            entries = store.read_committed(0, count)
            if len(entries) == count or ended:
                return [entry.ref for entry in entries if not entry.quarantined]
            if interrupted:
                break
            with waiting.blocked:
                waiting.begin()
                store.wait(mark, WAIT_S)
        return None


def _plan(step: int, visits: Sequence[Visit[CommittedRef]], last_seq: int) -> StepPlan:
    return StepPlan(step, tuple(visit.item.ref.sample_id for visit in visits), last_seq)


def _as_planned(
    plan: StepPlan, taken: list[Visit[CommittedRef]], quarantined: Collection[str]
) -> tuple[list[Visit[CommittedRef]], list[Visit[CommittedRef]]]:
    """The visits that a plan on record names, and those behind them that it does not reach.

    It may lack visits (of quarantined samples), and end before the last of them: it was the stream's
    tail once.
    """
    chosen: list[Visit[CommittedRef]] = []
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
