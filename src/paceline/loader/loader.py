"""StepLoader turns the log of committed samples into the plans of optimizer steps.

It takes samples in the order of their places, each as often as the run has passes (passes.py), and records
a step's plan before anything is computed. A block of the log is a range of places. The loader reads a block
when every place in it is settled, and a prompt that failed is missing from its block, so plans follow from
the prompts alone. The ranks that train read the features (training/worker.py). A sample that they cannot
read is captured again, and the step goes on with the same samples in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from time import monotonic

from paceline.errors import ConfigError, StoreError
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.records import Entry, Page, State
from paceline.loader.lengths import Lengths, QuarantinedError, StoppedError, by_tokens
from paceline.loader.passes import START, Block, Cut, Position, Visit, VisitOrder, at_most
from paceline.loader.planned import PlannedStep, as_planned, differs, goes_on, plan_of
from paceline.loader.settings import LoaderSettings
from paceline.target.version import TargetVersion
from paceline.telemetry import BlockedTime
from paceline.types import SampleRef

ARCHIVED = TargetVersion("unknown", "unknown")
WAIT_S = 1.0
ONE: Cut[Entry] = at_most(1)


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
        """`position`: how much of the log the weights contain. `on_wait`: called before each wait, to do what
        the producer may be waiting for."""
        self._session = session
        self._settings = settings
        self._should_stop, self._on_wait = should_stop, on_wait
        self._report, self._clock = report, clock
        self._blocked = BlockedTime(report, clock)
        self._interrupted = False  # the producer is gone and did not end the stream: no new sample will come
        self.exhausted = False  # whether the stream has ended and every visit has been planned
        self._order: VisitOrder[Entry] = VisitOrder(passes=settings.passes, position=position)
        self._cut: Cut[Entry] = at_most(settings.batch_size)
        self._cut_so_far = self._cut
        if settings.tokens_per_step is not None:
            lengths = Lengths(self.captured_again)
            self._cut = by_tokens(settings.tokens_per_step, lengths.learn)
            self._cut_so_far = by_tokens(settings.tokens_per_step, lengths.known)

    @property
    def blocked_seconds(self) -> float:
        """How long this consumer has waited for its producer."""
        return self._blocked.seconds

    # -- plans -----------------------------------------------------------------------------

    def next_step(self, step: int) -> PlannedStep | None:
        """Plan `step`; None at the end of the stream or when asked to stop.

        The last step may have fewer samples: the tail is trained, not dropped. Raises LedgerError
        if a replayed step would differ from its plan.
        """
        if self._should_stop():
            return None
        try:
            taken = self._order.visits(self._cut, self._read_block)
        except StoppedError:
            return None
        if not taken:
            self.exhausted = taken is not None
            return None
        quarantined = self._quarantined(taken)
        on_record = self._session.step_plan(step)
        if on_record is None:
            visits = [visit for visit in taken if visit.item.sample_id not in quarantined]
            plan = plan_of(step, visits)
        else:
            # A sample that was captured again may be longer or shorter than when the step was planned.
            while goes_on(on_record, taken, quarantined):
                more = self._order.visits(ONE, self._read_block)
                if more is None:
                    self._order.put_back(taken)
                    return None
                taken, quarantined = [*taken, *more], quarantined | self._quarantined(more)
                if not more:
                    break
            visits, rest = as_planned(on_record, taken, quarantined)
            plan, taken = on_record, taken[: len(taken) - len(rest)]
            self._order.put_back(rest)
        begun = self._session.plan(plan)
        if begun.plan.sample_ids != plan.sample_ids:
            raise differs(begun.plan, plan.sample_ids)
        after, settings = taken[-1].after, self._settings
        return PlannedStep(
            step,
            plan.rev,
            begun.deaths,
            tuple(visits),
            tuple(taken),
            settings.first_place(after),
            settings.progress(after),
        )

    def _quarantined(self, visits: Sequence[Visit[Entry]]) -> set[str]:
        records = self._session.find([visit.item.sample_id for visit in visits]).values()
        return {record.sample_id for record in records if record.state == State.QUARANTINED}

    def revise(self, planned: PlannedStep, quarantined: Collection[str]) -> PlannedStep:
        """The step without the quarantined samples, as a new revision of its plan."""
        visits = tuple(v for v in planned.visits if v.item.sample_id not in quarantined)
        plan = replace(plan_of(planned.step, visits), rev=planned.rev + 1)
        begun = self._session.plan(plan)
        return replace(planned, rev=plan.rev, deaths=begun.deaths, visits=visits)

    def leave(self, planned: PlannedStep) -> None:
        """Leave the step untrained: its plan stays on record for a replay, and no death is counted."""
        self._order.put_back(list(planned.taken))
        self._session.leave()

    def following(self) -> list[SampleRef]:
        """The refs of the next step, as far as they are committed; plans nothing."""
        visits = self._order.look_ahead(self._cut_so_far, self._block_if_there)
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
        places = self._settings.block(number)
        last_news, settled = self._clock(), -1
        with self._blocked:
            while not self._should_stop():
                mark, interrupted = self._session.lsn(), self._interrupted
                page = self._session.read(places.start, places.stop)
                block = self._whole(page, places)
                if block is not None or interrupted:
                    return block
                if page.settled != settled:
                    last_news, settled = self._clock(), page.settled
                self._refuse_silence(self._clock() - last_news)
                self._wait(mark)
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
        self._interrupted = True

    def rearm(self) -> None:
        """A producer is running again."""
        self._interrupted = False

    def first_refs(self, count: int) -> list[SampleRef] | None:
        """Wait for the run's first `count` samples; fewer if it has fewer. None if asked to stop.

        Quarantined samples are left out.
        """
        stop = count
        while not self._should_stop():
            mark, interrupted = self._session.lsn(), self._interrupted
            page = self._session.read(0, stop)
            missing = count - len(page.entries)
            if not missing or (page.closed and page.settled <= stop):
                self._refuse_another_target([entry.ref for entry in page.entries])
                return [entry.ref for entry in page.entries if entry.state != State.QUARANTINED]
            if page.settled >= stop:
                stop += missing  # so many prompts failed
                continue
            if interrupted:
                break
            with self._blocked:
                self._wait(mark)
        return None

    def _wait(self, mark: int) -> None:
        """Wait for a change of the ledger after `mark`, its log's number."""
        self._blocked.waiting()
        self._on_wait()
        self._session.wait(mark, WAIT_S)

    # -- samples that cannot be read -------------------------------------------------------

    def captured_again(self, tried: SampleRef, cause: str) -> SampleRef:
        """Report the sample lost, unless it is known to be, and wait for its new ref.

        The sample keeps its ordinal and its place in the plan. Raises StoppedError, QuarantinedError, or
        StoreError if no producer captures it in time.
        """
        session, reported = self._session, False
        deadline = self._clock() + self._settings.recapture_timeout_s
        with self._blocked:
            while True:
                mark, interrupted = session.lsn(), self._interrupted
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
                if self._should_stop():
                    raise StoppedError
                if interrupted or self._clock() > deadline:
                    break
                self._wait(mark)
        raise StoreError(
            f"The features of {tried.sample_id} are gone and were not captured again ({cause})",
            why="The sample is committed, so it must be trained later; no weights were changed.",
            next="run the same command again; `paceline produce RUN.yaml` captures it.",
        )
