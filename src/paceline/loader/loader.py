"""StepLoader turns the log of committed samples into the plans of optimizer steps.

It takes samples in the order of their places, each as often as the run has passes (passes.py), and records
a step's plan before anything is computed. A block of the log is a range of places. The loader reads a block
when every place in it is settled, and a prompt that failed is missing from its block, so plans follow from
the prompts alone. The ranks that train read the features (training/worker.py). A sample that they cannot
read is captured again (recapture.py), and the step goes on with the same samples in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from paceline.errors import ConfigError, LedgerError
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.records import Entry, Page, State, StepPlan, TrainedSample, TrainedStep
from paceline.loader.passes import START, Block, Position, Visit, VisitOrder
from paceline.loader.recapture import WAIT_S, Recapture
from paceline.loader.waiting import Waiting
from paceline.target.version import TargetVersion
from paceline.types import SampleRef

ARCHIVED = TargetVersion("unknown", "unknown")
Visits = tuple[Visit[Entry], ...]


@dataclass(frozen=True)
class LoaderSettings:
    """The settings that decide the plans (passes.py explains passes and blocks), and the loader's timeouts.

    `starts`: the places at which prompts were added to a complete run; a block begins at each.
    """

    batch_size: int
    passes: int = 1
    block_size: int = 64
    starts: Sequence[int] = (0,)
    idle_timeout_s: float | None = None
    recapture_timeout_s: float = 1800.0
    target: TargetVersion | None = None  # only its samples may be planned; None: any

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


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: the refs of its samples, in plan order.

    `taken`: the visits that it took from the order; `visits`: those of them that it trains. `deaths` counts
    consumers that died in it. `first_place`: where a consumer that resumes after it begins to read the log.
    """

    step: int
    rev: int
    deaths: int
    visits: Visits
    taken: Visits
    first_place: int = 0

    @property
    def refs(self) -> tuple[SampleRef, ...]:
        return tuple(visit.item.ref for visit in self.visits)

    @property
    def sample_ids(self) -> list[str]:
        """Each id once, although with several passes a sample may come twice in a step."""
        return list(dict.fromkeys(visit.item.sample_id for visit in self.visits))

    @property
    def finished(self) -> list[SampleRef]:
        """The samples that have their last visit in this step."""
        return [visit.item.ref for visit in self.visits if visit.is_last]

    @property
    def after(self) -> Position:
        """The run's position after the step."""
        return self.taken[-1].after

    @property
    def trained(self) -> TrainedStep:
        """The step as a checkpoint's lineage records it."""
        samples = [
            TrainedSample(v.item.place, v.item.sample_id, v.item.ref.ordinal, v.is_last) for v in self.visits
        ]
        return TrainedStep(self.step, self.rev, tuple(samples))

    def with_refs(self, refs: Mapping[str, SampleRef]) -> PlannedStep:
        """The same step with the newest ref of each sample."""
        visits = tuple(replace(v, item=replace(v.item, ref=refs[v.item.sample_id])) for v in self.visits)
        return replace(self, visits=visits)


class StepLoader:
    def __init__(
        self,
        session: ConsumerSession,
        settings: LoaderSettings,
        *,
        position: Position = START,
        should_stop: Callable[[], bool] = lambda: False,
        on_wait: Callable[[], None] = lambda: None,
        report: Callable[..., None] = lambda *_, **__: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`position`: how much of the log the weights contain. `on_wait`: called before each wait."""
        self._session = session
        self._settings = settings
        self._waiting = Waiting(should_stop=should_stop, on_wait=on_wait, report=report, clock=clock)
        self.recapture = Recapture(session, self._waiting, report, settings.recapture_timeout_s)
        self.exhausted = False  # whether the stream has ended and every visit has been planned
        self._order: VisitOrder[Entry] = VisitOrder(passes=settings.passes, position=position)

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
        taken = self._order.visits(self._settings.batch_size, self._read_block)
        if not taken:
            self.exhausted = taken is not None
            return None
        quarantined = self._quarantined([visit.item.sample_id for visit in taken])
        on_record = self._session.step_plan(step)
        if on_record is None:
            visits = [visit for visit in taken if visit.item.sample_id not in quarantined]
            plan = _plan(step, visits)
        else:
            visits, rest = _as_planned(on_record, taken, quarantined)
            plan, taken = on_record, taken[: len(taken) - len(rest)]
            self._order.put_back(rest)
        begun = self._session.plan(plan)
        if begun.plan.sample_ids != plan.sample_ids:
            raise _differs(begun.plan, plan.sample_ids)
        first = self._settings.first_place(taken[-1].after)
        return PlannedStep(step, plan.rev, begun.deaths, tuple(visits), tuple(taken), first)

    def _quarantined(self, sample_ids: Sequence[str]) -> set[str]:
        records = self._session.find(sample_ids).values()
        return {record.sample_id for record in records if record.state == State.QUARANTINED}

    def revise(self, planned: PlannedStep, quarantined: Collection[str]) -> PlannedStep:
        """The step without the quarantined samples, as a new revision of its plan."""
        visits = tuple(v for v in planned.visits if v.item.sample_id not in quarantined)
        plan = replace(_plan(planned.step, visits), rev=planned.rev + 1)
        begun = self._session.plan(plan)
        return replace(planned, rev=plan.rev, deaths=begun.deaths, visits=visits)

    def leave(self, planned: PlannedStep) -> None:
        """Leave the step untrained: its plan stays on record for a replay, and no death is counted."""
        self._order.put_back(list(planned.taken))
        self._session.leave(planned.step)

    def following(self) -> list[SampleRef]:
        """The refs of the next step, as far as they are committed; plans nothing."""
        visits = self._order.look_ahead(self._settings.batch_size, self._block_if_there)
        return [visit.item.ref for visit in visits]

    # -- the stream ------------------------------------------------------------------------

    def _whole(self, page: Page, places: range) -> Block[Entry] | None:
        if page.settled >= places.stop or page.closed:
            self._refuse_another_target([entry.ref for entry in page.entries])
            return Block(list(page.entries), ends=page.closed and page.settled <= places.stop)
        return None

    def _refuse_another_target(self, refs: Sequence[SampleRef]) -> None:
        target = self._settings.target
        for ref in refs:
            version = TargetVersion(ref.target_model_version, ref.tokenizer_version)
            # The ref of an archived sample does not name its target; the sample is in the weights already.
            if target is not None and version not in (target, ARCHIVED):
                raise ConfigError(
                    f"{ref.sample_id} was captured from another target ({version.model}, tokenizer "
                    f"{version.tokenizer}) than this consumer has ({target.model}, {target.tokenizer}).",
                    why="The draft would learn the states of one model and the distributions of another.",
                    next="give producer and consumer the same target.model, or start a new run.",
                )

    def _block_if_there(self, number: int) -> Block[Entry] | None:
        """The block, if every place in it is settled or the stream has ended; else None."""
        places = self._settings.block(number)
        return self._whole(self._session.read(places.start, places.stop), places)

    def _read_block(self, number: int) -> Block[Entry] | None:
        """Wait for the block; None after a stop or an interruption."""
        waiting, places = self._waiting, self._settings.block(number)
        last_news, settled = waiting.clock(), -1
        with waiting.blocked:
            while not waiting.should_stop():
                mark, interrupted = self._session.lsn(), waiting.interrupted
                page = self._session.read(places.start, places.stop)
                block = self._whole(page, places)
                if block is not None or interrupted:
                    return block
                if page.settled != settled:
                    last_news, settled = waiting.clock(), page.settled
                self._refuse_silence(waiting.clock() - last_news)
                waiting.begin()
                self._session.wait(mark, WAIT_S)
        return None

    def _refuse_silence(self, seconds: float) -> None:
        limit = self._settings.idle_timeout_s
        if limit is not None and seconds > limit:
            raise TimeoutError(
                f"No new sample for {limit:g} s and the stream is not closed. The producer "
                "may be dead; nothing is lost. Next: start it again with `paceline produce RUN.yaml`."
            )

    def interrupt(self) -> None:
        """The producer is gone and did not end the stream: only whole steps are trained."""
        self._waiting.interrupted = True

    def rearm(self) -> None:
        """A producer is running again."""
        self._waiting.interrupted = False

    def first_refs(self, count: int) -> list[SampleRef] | None:
        """Wait for the run's first `count` samples; fewer if it has fewer. None if asked to stop.

        Quarantined samples are left out.
        """
        session, waiting, stop = self._session, self._waiting, count
        while not waiting.should_stop():
            mark, interrupted = session.lsn(), waiting.interrupted
            page = session.read(0, stop)
            missing = count - len(page.entries)
            if not missing or (page.closed and page.settled <= stop):
                self._refuse_another_target([entry.ref for entry in page.entries])
                return [entry.ref for entry in page.entries if entry.state != State.QUARANTINED]
            if page.settled >= stop:
                stop += missing  # so many prompts failed
                continue
            if interrupted:
                break
            with waiting.blocked:
                waiting.begin()
                session.wait(mark, WAIT_S)
        return None


def _plan(step: int, visits: Sequence[Visit[Entry]]) -> StepPlan:
    return StepPlan(step, tuple(visit.item.sample_id for visit in visits))


def _as_planned(
    plan: StepPlan, taken: list[Visit[Entry]], quarantined: Collection[str]
) -> tuple[list[Visit[Entry]], list[Visit[Entry]]]:
    """The visits that a plan on record names, and the visits after its end.

    The plan may lack visits (of quarantined samples), and it may end early: it was the stream's tail when
    it was recorded.
    """
    chosen: list[Visit[Entry]] = []
    end = 0
    for place, visit in enumerate(taken, start=1):
        if visit.item.sample_id in plan.sample_ids[len(chosen) : len(chosen) + 1]:
            chosen.append(visit)
        elif visit.item.sample_id not in quarantined:
            break
        end = place
    if end == 0 or len(chosen) < len(plan.sample_ids):
        raise _differs(plan, [visit.item.sample_id for visit in taken])
    return chosen, taken[end:]


def _differs(plan: StepPlan, now: Sequence[str]) -> LedgerError:
    return LedgerError(
        f"Step {plan.step} was planned as {list(plan.sample_ids)} but the log now gives {list(now)}.",
        why="Training other samples than planned would break the guarantee of equal weights.",
        next="run `paceline fsck RUN` and report this with its output; nothing was trained.",
    )
