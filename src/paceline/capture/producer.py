"""The producer's loop: wait for credit, lease prompts, reserve, capture, put, commit.

Prompts are read, encoded and captured in fixed groups (the g-th `group_size` of the run's prompt order),
because the bits of a captured state depend on the batch it was computed in. After a crash or the loss
of a feature the engine captures the whole group again, which gives the same bits, and the producer
stores only the samples it needs. Commits happen in prompt order, so the committed log, and with it
every step plan, is the same in every run of the same configuration. A prompt on which the engine fails
is found by isolation (isolation.py) and fails with its reason; its group goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from time import monotonic

from paceline.capture.backpressure import WAIT_S, Backpressure
from paceline.capture.encoding import EncodedPrompt, Encoding
from paceline.capture.first_answers import CapturedPrompt, FirstAnswers
from paceline.capture.groups import CaptureGroup, Groups
from paceline.capture.in_flight import CaptureInFlight, CapturesInFlight
from paceline.capture.isolation import CaptureFailedError, Isolation
from paceline.capture.neighbours import Neighbours
from paceline.capture.samples import Samples
from paceline.capture.settings import CaptureSettings
from paceline.capture.upkeep import Upkeep
from paceline.data.answers import AnswerFiles
from paceline.data.source import PromptSource
from paceline.engines.engine import TargetEngine
from paceline.errors import ConfigError, FencedError, LedgerError, ServerUnavailableError, StoreFullError
from paceline.features.store import FeatureStore
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Wanted
from paceline.types import SampleRef

FULL_IN_A_ROW_MAX = 8  # groups that found no room in the store, though the ledger had promised it


class Producer:
    def __init__(
        self,
        session: ProducerSession,
        engine: TargetEngine,
        features: FeatureStore,
        prompts: PromptSource,
        settings: CaptureSettings,
        backpressure: Backpressure,
        *,
        answers: AnswerFiles | None = None,
        report: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """`answers`: where to keep answers; None: nowhere, for an engine that repeats its bits."""
        self.session = session
        self.engine = engine
        self._features = features
        self._prompts = prompts
        self._settings = settings
        self._backpressure = backpressure
        self._neighbours: Neighbours | None = None
        self._full_in_a_row = 0
        self._upkeep = Upkeep(session, features, backpressure, report)
        self._report = report
        self.encoding = Encoding(engine, settings)
        self._answers = None if answers is None else FirstAnswers(answers, settings, engine.facts)
        kept = None if engine.facts.repeats_bits else self._answers
        self._groups = Groups(session, prompts, self.encoding, settings.group_size, kept)
        self._samples = Samples(session.run_id, engine, features, settings, self.encoding)
        self._captured: EncodedPrompt | None = None  # the last prompt that this process captured
        self._isolation = Isolation(
            session,
            answer=self._samples.capture,
            probe=engine.probe,
            captured_before=self._captured_before,
            report=report,
            in_a_row_max=settings.failures_in_a_row_max,
        )

    def meet(self, neighbours: Neighbours) -> None:
        """There are other producers, or may be soon. Call it before `run`."""
        self._neighbours = neighbours

    def run(self, max_rounds: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """Capture until every prompt is settled, then end the stream; the number of samples committed.

        Takes the worker's role first, which returns leases of its earlier process or of a call that failed.
        A stop, or `max_rounds` turns of this loop (not rounds of the data), leaves the stream open for the
        next call.
        """
        stop = should_stop or (lambda: False)
        self._take_over()
        committed, turns = 0, 0
        most = min(self._settings.groups_in_flight, self.engine.facts.groups_in_flight_max)
        in_flight = CapturesInFlight(self._samples.capture, most)
        try:
            while True:
                groups: list[CaptureGroup] | None = None
                if in_flight.has_room and not stop() and (max_rounds is None or turns < max_rounds):
                    self._tell_held(in_flight.groups)
                    groups, turns = self._lease(stop, alone=not in_flight), turns + 1
                self._tell_held([*in_flight.groups, *(groups or ())])
                for group in groups or ():
                    self._begin(group, in_flight)
                if in_flight and not (groups and in_flight.has_room):
                    committed += self._end(in_flight.first_done())
                elif groups is None:
                    break
        finally:
            for capture in in_flight.close():
                self._give_up(capture.group)
            self._isolation.give_back_held()
            if self._neighbours is not None:
                self._neighbours.end()
        return committed

    def stay(self, should_stop: Callable[[], bool]) -> bool:
        """After `run`: wait until a prompt is open again; False if asked to stop first.

        The others hear meanwhile that this producer lives, so no other is given its name. Raises FencedError
        if it was taken for dead all the same.
        """
        if self._neighbours is not None:
            self._neighbours.begin()
        try:
            while not should_stop():
                mark, now = self.session.lsn(), self.session.snapshot()
                if now.prompts.open or not now.closed:
                    return True
                self.session.refuse_if_replaced()
                self.session.wait(mark, WAIT_S)
        finally:
            if self._neighbours is not None:
                self._neighbours.end()
        return False

    def _take_over(self) -> None:
        """Take the worker's role, free what its dead process never committed, and report lost samples.

        Taking the role revokes the worker's byte intents in one transaction; bytes are freed after it.
        """
        epoch = self.session.acquire()
        if self._neighbours is not None:
            self._neighbours.begin()
        orphans, gone = self._upkeep.compare()
        if not self.session.snapshot().committed and (note := self.encoding.look_for_long(self._prompts)):
            self._report("note", message=note)
        self._groups.make_known()  # after that look: a run that refuses its prompts may be given others
        self._groups.bind_rendering()
        self._report("started", orphans=orphans, lost=len(gone), epoch=epoch)

    def _finish(self) -> bool:
        """End the stream unless prompts are still to be captured; whether the stream ended."""
        aside = self._isolation.num_held
        if self._neighbours is not None:
            aside += self._neighbours.num_aside()
        if self.session.snapshot().prompts.open > aside:  # leased, or too far ahead to be leased yet
            return False
        self._isolation.finish()
        self._upkeep.free_revoked()
        ended = self.session.end_stream()
        if ended:
            self._report("finished", failed_prompts=self.session.snapshot().prompts.failed)
        return ended

    def _lease(self, stop: Callable[[], bool], *, alone: bool) -> list[CaptureGroup] | None:
        """The next prompts to capture, as groups; [] if there are none now, None if there will be none.

        `alone`: nothing is in flight, so this may wait for room or for other workers, and end the stream.
        """
        pressure, size = self._backpressure, self._settings.group_size
        if not alone and not pressure.has_credit():
            return []
        if alone and not pressure.wait_for_credit(stop, self._before_wait):
            return None
        if self._neighbours is not None:
            self._neighbours.look(is_idle=False)
        mark = self.session.lsn()
        leases = self.session.lease(size, size, self._bound())
        if not leases and not self._groups.make_known() and alone:
            if self._finish():
                return None
            self._before_wait()
            with pressure.idle:
                pressure.idle.waiting()
                self.session.wait(mark, WAIT_S)  # others hold the remaining prompts, or those before them
        parts = groupby(leases, lambda lease: self._groups.bounds(lease.ordinal))
        return [self._groups.group(list(together)) for _, together in parts]

    def _bound(self) -> int | None:
        return None if self._neighbours is None else self._neighbours.bound()

    def _before_wait(self) -> None:
        self._upkeep.before_wait()
        if self._neighbours is not None:
            self._tell_held([])
            self._neighbours.look(is_idle=True)

    def _tell_held(self, groups: Sequence[CaptureGroup]) -> None:
        if self._neighbours is not None:
            firsts = [self._groups.bounds(group.wanted[0].ordinal).start for group in groups]
            self._neighbours.holds(firsts, self._isolation.num_held)

    def _begin(self, group: CaptureGroup, in_flight: CapturesInFlight) -> None:
        """Reserve bytes for the group's wanted samples, and let the engine capture the whole group."""
        began_at = monotonic()
        if group.lost:  # another process may have written these bytes
            self._features.free(list(group.lost.values()))
        try:
            group = self._isolation.without_known(group)
        except ServerUnavailableError:
            self._give_up(group)
            raise
        generations = self._reserve(group) if group.wanted else None
        if generations is not None:
            in_flight.begin(CaptureInFlight(group, generations, began_at))

    def _end(self, capture: CaptureInFlight) -> int:
        """Store and commit the wanted samples of a captured group; the number of new ones."""
        group, generations = capture.group, capture.generations
        try:
            captured = self._result(capture)
        except (ConfigError, ServerUnavailableError):
            self._give_up(group)
            raise
        if captured is None:
            return 0
        by_id = {one.prompt.task_id: one for one in captured}
        wanted = [by_id[prompt.task_id] for prompt in group.wanted]
        if self._answers is not None:
            self._answers.keep(group.wanted, wanted, self.session.refuse_if_replaced, generations)
        refs = self._stored(wanted, group, generations)
        if refs is None:
            return 0
        try:
            fresh = self.session.commit(refs)
        except FencedError:
            # The producer that took the work over may have looked for these bytes before they were here.
            self._features.free(list(generations.items()))
            raise
        self._upkeep.free_unwanted(refs, fresh)
        self._captured = group.wanted[-1]
        self._isolation.succeeded()
        self._report(
            "group",
            group=group.wanted[0].ordinal // self._settings.group_size,
            samples=len(fresh),
            num_tokens=sum(ref.num_tokens for ref in refs),
            seconds=monotonic() - capture.began_at,
            blocked_seconds=self._backpressure.blocked.seconds,
            idle_seconds=self._backpressure.idle.seconds,
        )
        return len(fresh)

    def _stored(
        self, wanted: Sequence[CapturedPrompt], group: CaptureGroup, generations: Mapping[str, int]
    ) -> list[SampleRef] | None:
        """The refs of the stored samples; None if the store had no room after all, and the leases are ended.

        The ledger counts what is promised. The store may also hold what another producer is about to free.
        """
        try:
            refs = [self._samples.put(one, generations, group.rendering) for one in wanted]
        except StoreFullError as error:
            if self._neighbours is None or self._full_in_a_row >= FULL_IN_A_ROW_MAX:
                raise
            self._full_in_a_row += 1
            self._features.free(list(generations.items()))
            self.session.swept(list(generations.values()))
            self._give_up(group)
            self._report("group_failed", prompts=[], failed=0, message=f"it is captured again: {error}")
            return None
        self._full_in_a_row = 0
        return refs

    def _result(self, capture: CaptureInFlight) -> list[CapturedPrompt] | None:
        """The captured samples; None if the capture failed, and isolation has ended its leases."""
        try:
            return self._as_before(capture.group, capture.future.result())
        except CaptureFailedError as failure:
            self.session.swept(list(capture.generations.values()))  # nothing was written
            self._isolation.find(capture.group, failure)
            return None

    def _as_before(self, group: CaptureGroup, captured: list[CapturedPrompt]) -> list[CapturedPrompt]:
        """The captured samples; a lost one that has another answer than before is prefilled with that one."""
        lost = [prompt for prompt in group.wanted if prompt.ordinal in group.lost]
        changed = [] if self._answers is None else self._answers.changed(lost, captured)
        if not changed:
            return captured
        self._report(
            "note",
            message=f"{len(changed)} lost samples (the first: {changed[0].task_id}) came back with another "
            "answer: they keep the one they had, and their states may differ in rounding",
        )
        again = {one.prompt.task_id: one for one in self._samples.capture(changed)}
        return [again.get(one.prompt.task_id, one) for one in captured]

    def _give_up(self, group: CaptureGroup) -> None:
        """Give the leases back, or the next start would count them as held by a producer that died."""
        with suppress(LedgerError):  # the error that ended the run is reported instead
            self.session.give_back([prompt.ordinal for prompt in group.wanted])

    def _reserve(self, group: CaptureGroup) -> dict[str, int] | None:
        """The generation to write each wanted sample under; None if another worker took the room."""
        size = self._backpressure.sample_bytes
        wanted = [Wanted(p.ordinal, self._samples.id_of(p), size) for p in group.wanted]
        generations = self.session.reserve(wanted, self._backpressure.budget)
        if generations is None:
            self.session.give_back([prompt.ordinal for prompt in group.wanted])
            return None
        return {item.sample_id: number for item, number in zip(wanted, generations, strict=True)}

    def _captured_before(self) -> EncodedPrompt | None:
        return self._captured or self._groups.captured_before()
