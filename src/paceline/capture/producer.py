"""The producer's loop: wait for credit, lease prompts, reserve, capture, put, commit.

Prompts are read, encoded and captured in fixed groups (the g-th `group_size` of the run's prompt order),
because the bits of a captured state depend on the batch it was computed in. After a crash or the loss
of a feature the engine captures the whole group again, which gives the same bits, and the producer
stores only the samples it needs. Commits happen in prompt order, so the committed log, and with it
every step plan, is the same in every run of the same configuration. A prompt on which the engine fails
is found by isolation (isolation.py) and fails with its reason; its group goes on without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from time import monotonic

from paceline.capture.backpressure import WAIT_S, Backpressure
from paceline.capture.encoding import EncodedPrompt, Encoding
from paceline.capture.first_answers import CapturedPrompt, FirstAnswers, token_ids
from paceline.capture.groups import CaptureGroup, Groups
from paceline.capture.in_flight import CaptureInFlight, CapturesInFlight
from paceline.capture.isolation import CaptureFailedError, Isolation, as_failure
from paceline.capture.settings import CaptureSettings
from paceline.capture.turns import TurnError, TurnWriter
from paceline.capture.upkeep import Upkeep
from paceline.data.answers import AnswerFiles
from paceline.data.source import PromptSource
from paceline.engines.engine import CaptureRequest, TargetEngine
from paceline.errors import ConfigError, LedgerError, ServerUnavailableError
from paceline.features.store import FeatureStore
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Wanted
from paceline.types import SampleRef, Tokens, name_of


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
        self._upkeep = Upkeep(session, features, backpressure, report)
        self._report = report
        self.encoding = Encoding(engine, settings)
        self._turns = TurnWriter(
            lambda: self.encoding.chats, self.encoding.limits, self._written, settings.too_long
        )
        self._answers = None if answers is None else FirstAnswers(answers, settings, engine.facts)
        kept = None if engine.facts.repeats_bits else self._answers
        self._groups = Groups(session, prompts, self.encoding, settings.group_size, kept)
        self._captured: EncodedPrompt | None = None  # the last prompt that this process captured
        self._isolation = Isolation(
            session,
            answer=self._answer,
            probe=engine.probe,
            captured_before=self._captured_before,
            report=report,
            in_a_row_max=settings.failures_in_a_row_max,
        )

    def run(self, max_rounds: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """Capture until every prompt is settled, then end the stream; the number of samples committed.

        Takes the worker's role first, which returns leases of its earlier process or of a call that failed.
        A stop, or `max_rounds` turns of the loop, leaves the stream open for the next call.
        """
        stop = should_stop or (lambda: False)
        self._take_over()
        committed, rounds = 0, 0
        most = min(self._settings.groups_in_flight, self.engine.facts.groups_in_flight_max)
        in_flight = CapturesInFlight(self._answer, most)
        try:
            while True:
                groups: list[CaptureGroup] | None = None
                if in_flight.has_room and not stop() and (max_rounds is None or rounds < max_rounds):
                    groups, rounds = self._lease(stop, alone=not in_flight), rounds + 1
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
        return committed

    def _take_over(self) -> None:
        """Take the worker's role, free what its dead process never committed, and report lost samples.

        Taking the role revokes the worker's byte intents in one transaction; bytes are freed after it.
        """
        epoch = self.session.acquire()
        orphans, gone = self._upkeep.compare()
        if not self.session.snapshot().committed and (note := self.encoding.look_for_long(self._prompts)):
            self._report("note", message=note)
        self._groups.make_known()  # after that look: a run that refuses its prompts may be given others
        self._groups.bind_rendering()
        self._report("started", orphans=orphans, lost=len(gone), epoch=epoch)

    def _finish(self) -> bool:
        """End the stream unless prompts are still to be captured; whether the stream ended."""
        if self.session.snapshot().prompts.leased > self._isolation.num_held:
            return False
        self._isolation.finish()
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
        if alone and not pressure.wait_for_credit(stop, self._upkeep.before_wait):
            return None
        mark = self.session.lsn()
        leases = self.session.lease(size, size)
        if not leases and not self._groups.make_known() and alone:
            if self._finish():
                return None
            self.session.wait(mark, WAIT_S)  # other workers hold the remaining prompts
        parts = groupby(leases, lambda lease: self._groups.bounds(lease.ordinal))
        return [self._groups.group(list(together)) for _, together in parts]

    def _begin(self, group: CaptureGroup, in_flight: CapturesInFlight) -> None:
        """Reserve bytes for the group's wanted samples, and let the engine capture the whole group."""
        began_at = monotonic()
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
            self._answers.keep(group.wanted, wanted)
        refs = [self._put(one, generations, group.rendering) for one in wanted]
        fresh = self.session.commit(refs)
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
        )
        return len(fresh)

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
        again = {one.prompt.task_id: one for one in self._answer(changed)}
        return [again.get(one.prompt.task_id, one) for one in captured]

    def _give_up(self, group: CaptureGroup) -> None:
        """Give the leases back, or the next start would count them as held by a producer that died."""
        with suppress(LedgerError):  # the error that ended the run is reported instead
            self.session.give_back([prompt.ordinal for prompt in group.wanted])

    def _reserve(self, group: CaptureGroup) -> dict[str, int] | None:
        """The generation to write each wanted sample under; None if another worker took the room."""
        size = self._backpressure.sample_bytes
        wanted = [Wanted(p.ordinal, self._groups.sample_id(p), size) for p in group.wanted]
        generations = self.session.reserve(wanted, self._backpressure.budget)
        if generations is None:
            self.session.give_back([prompt.ordinal for prompt in group.wanted])
            return None
        return {item.sample_id: number for item, number in zip(wanted, generations, strict=True)}

    def _captured_before(self) -> EncodedPrompt | None:
        return self._captured or self._groups.captured_before()

    # -- capture -----------------------------------------------------------------------------

    def _answer(self, members: Sequence[EncodedPrompt]) -> list[CapturedPrompt]:
        """Capture these prompts. Raises CaptureFailedError for any error that the input may cause."""
        try:
            asked = self._turns.write(members)
            samples = self.engine.capture([self._request(one) for one in asked], self._settings.features)
        except TurnError as error:
            may_help = not self.engine.facts.repeats_bits
            raise CaptureFailedError(error, error.reasons, retryable=may_help) from error
        except ConfigError:
            raise
        except Exception as error:
            raise as_failure(error) from error
        return [CapturedPrompt(*pair) for pair in zip(asked, samples, strict=True)]

    def _written(self, prompts: Sequence[EncodedPrompt], turn: int) -> list[tuple[int, ...]]:
        """What the target answers to these prompts in an earlier turn of their chats."""
        features = [feature for feature in self._settings.features if isinstance(feature.source, Tokens)]
        requests = [self._request(prompt, turn) for prompt in prompts]
        captured = self.engine.capture(requests, features)
        tokens = [token_ids(sample, features) for sample in captured]
        return [ids[len(prompt.token_ids) :] for ids, prompt in zip(tokens, prompts, strict=True)]

    def _request(self, prompt: EncodedPrompt, turn: int | None = None) -> CaptureRequest:
        """`turn`: an earlier one of a chat; None: the last one."""
        s, sample_id = self._settings, self._groups.sample_id(prompt)
        if prompt.is_whole:
            return CaptureRequest(sample_id, prompt.token_ids, prompt.spans)
        return CaptureRequest(
            sample_id,
            prompt.token_ids,
            prompt.spans,
            max_new_tokens=s.max_answer_tokens,
            temperature=s.temperature_in(prompt.round),
            seed=sample_seed(s.seed, prompt.ordinal, turn),
        )

    def _put(self, captured: CapturedPrompt, generations: Mapping[str, int], rendering: str) -> SampleRef:
        prompt, sample = captured.prompt, captured.sample
        sample_id, generation = sample.sample_id, generations[sample.sample_id]
        sealed = self._features.put(sample_id, sample.tensors, generation=generation)
        facts, tokens = self.engine.facts, sample.tensors[name_of(Tokens, self._settings.features)]
        is_written = self._settings.answers == "target"
        return SampleRef(
            sample_id=sample_id,
            run_id=self.session.run_id,
            source_task_id=prompt.task_id,
            feature_store_uri=sealed.uri,
            feature_keys=sealed.keys,
            feature_specs=sealed.specs,
            strategy=self._settings.strategy,
            num_tokens=int(tokens.shape[0]) - 1,  # that the target processed
            estimated_bytes=sealed.num_bytes,
            target_model_version=facts.model_version,
            tokenizer_version=facts.tokenizer_version,
            metadata={
                "digest": sealed.digest,
                "digest_kind": sealed.digest_kind,
                "rendering": rendering,
                "greedy": is_written and self._settings.temperature_in(prompt.round) == 0.0,
            },
            generation=generation,
            ordinal=prompt.ordinal,
        )


def sample_seed(run_seed: int, ordinal: int, turn: int | None = None) -> int:
    """A different seed for every sample and for every earlier `turn` of a chat, below 2**63."""
    which = f"{run_seed}:{ordinal}" if turn is None else f"{run_seed}:{ordinal}:{turn}"
    digest = hashlib.sha256(which.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
