"""The producer's loop: wait for credit, lease prompts, reserve, capture, put, commit.

Prompts are read, encoded and captured in fixed groups (the g-th `group_size` of the run's prompt order),
because the bits of a captured state depend on the batch it was computed in. A group that is captured
again, after a crash or because a feature was lost, is computed whole and gives the same bits;
only the samples that are wanted are stored. Commits happen in prompt order, so the committed log,
and with it every step plan, is the same in every run of the same configuration. A prompt on which the
engine fails is found (isolation.py) and set aside with its reason; its group goes on without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from time import monotonic

from paceline.capture.backpressure import WAIT_S, Backpressure
from paceline.capture.encoding import EncodedPrompt, Encoding, PromptLimits
from paceline.capture.groups import CaptureGroup, Groups
from paceline.capture.isolation import FAILURES_IN_A_ROW_MAX, CaptureFailedError, Isolation, as_failure
from paceline.capture.source import PromptSource
from paceline.engines.engine import Captured, CaptureRequest, TargetEngine
from paceline.features.store import FeatureStore, Written
from paceline.ledger.producer_session import ProducerSession, Wanted
from paceline.ledger.records import Ownership, State
from paceline.types import Feature, SampleRef, Tokens, name_of


@dataclass(frozen=True)
class CaptureSettings:
    """`first_round_temperature` is for prompts that the run answers for the first time.

    `features`: what the draft's method trains on, as `DraftMethod.features` gave it. `max_prompt_tokens`:
    longer prompts are set aside; None: no limit.
    """

    group_size: int
    max_answer_tokens: int
    features: tuple[Feature, ...]
    first_round_temperature: float = 0.0
    temperature: float = 0.8
    seed: int = 0
    strategy: str = "eagle3"
    max_prompt_tokens: int | None = None
    failures_in_a_row_max: int = FAILURES_IN_A_ROW_MAX


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
        report: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        self.session = session
        self.engine = engine
        self._features = features
        self._prompts = prompts
        self._settings = settings
        self._backpressure = backpressure
        self._report = report
        limits = PromptLimits(engine.facts.vocab_size, settings.max_prompt_tokens)
        self.encoding = Encoding(
            engine.encode, limits.for_positions(engine.facts.max_positions, settings.max_answer_tokens)
        )
        self._groups = Groups(session, prompts, self.encoding, settings.group_size)
        self._captured: EncodedPrompt | None = None  # the last one that this process captured
        self._isolation = Isolation(
            session,
            answer=self._answer,
            probe=engine.probe,
            captured_before=self._captured_before,
            report=report,
            in_a_row_max=settings.failures_in_a_row_max,
        )

    def run(self, max_rounds: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """Capture until every prompt is settled, then end the stream; samples committed by this call.

        Takes the worker's role first: leases of its earlier process, or of a call that failed, return. A
        stop or `max_rounds` leaves the stream open: the next call goes on from there.
        """
        stop = should_stop or (lambda: False)
        self._take_over()
        committed, rounds, size = 0, 0, self._settings.group_size
        try:
            while not stop() and (max_rounds is None or rounds < max_rounds):
                if not self._backpressure.wait_for_credit(stop, self._before_wait):
                    break
                mark = self.session.lsn()
                leases = self.session.lease(size, size)
                if not leases and not self._groups.make_known():
                    if self._finish():
                        break
                    self.session.wait(mark, WAIT_S)  # other workers hold what is left
                for _, together in groupby(leases, lambda lease: self._groups.bounds(lease.ordinal)):
                    committed += self._capture(self._groups.group(list(together)))
                rounds += 1
        finally:
            self._isolation.give_back_held()
        return committed

    def _take_over(self) -> None:
        """Become the worker, free what its dead process never committed, and report what is gone.

        Taking the role revokes the worker's byte intents, in one transaction; only then are bytes deleted.
        """
        epoch = self.session.acquire()
        orphans, gone = self._compare_with_features()
        self._groups.make_known()
        self._groups.bind_rendering()
        if not self.session.snapshot().committed and (note := self.encoding.look_for_long(self._prompts)):
            self._report("note", message=note)
        self._report("started", orphans=orphans, lost=len(gone), epoch=epoch)

    def _compare_with_features(self) -> tuple[int, list[str]]:
        """Free bytes that belong to no sample and no worker, and report what is gone; how many, and which.

        The store is listed before the ledger is asked: what is listed under a generation that the ledger
        gave out, and is neither a sample's nor promised to a worker, belongs to none. One that it never
        gave out is of a ledger of which this one is an older copy: it is skipped over, and then an orphan.
        A store that keeps no list is told what was revoked.
        """
        written = self._features.written()
        owned = self.session.ownership()
        if written is None:
            return self._free_revoked(), []
        newest = max((generation for _, generation in written), default=0)
        if newest >= owned.next_generation:
            self.session.swept([], skip_through=newest)
        keep = owned.generations
        orphans = [
            (sample_id, generation)
            for sample_id, generation in written
            if generation not in keep and owned.present.get(sample_id) != 0
        ]
        self._features.free(orphans)
        self._free_revoked()
        # After a reboot the ledger knows samples that the memory forgot: all are reported at once.
        gone = self._without_bytes(owned, written)
        gone = self._without_bytes(owned, self._features.written() or []) if gone else []
        if gone:
            self.session.report_lost(gone)
        return len(orphans), gone

    @staticmethod
    def _without_bytes(owned: Ownership, written: Sequence[Written]) -> list[str]:
        """Samples that ought to be there. (Others may have come since the store was listed.)"""
        there = set(written)
        names = {sample_id for sample_id, _ in written}
        return [
            sample_id
            for sample_id, generation in owned.present.items()
            if (sample_id, generation) not in there and (generation or sample_id not in names)
        ]

    def _free_revoked(self) -> int:
        """Free bytes that were promised to a worker that is gone; how many there may have been."""
        revoked = self.session.revoked()
        if revoked:
            self._features.free(revoked)
            self.session.swept([generation for _, generation in revoked])
        return len(revoked)

    def _before_wait(self) -> None:
        self._free_revoked()
        self._make_room()

    def _make_room(self) -> None:
        """The consumer may wait for a sample that this producer has no room for: one that was lost, or the
        next of the log, while samples behind it, captured by other workers, take the room.

        Those are given up, the last first, until a group fits: features are a cache, and they are captured
        again when the consumer has come closer.
        """
        lost, settled = self.session.lost(1), self.session.snapshot().settled
        needed = min([settled, *(record.place for record in lost)])
        behind = [record for record in self.session.present() if record.place > needed and not record.durable]
        if not behind or (not lost and behind[-1].place < settled) or self._backpressure.has_credit():
            return
        given_up = 0
        for record in reversed(behind):
            self.session.report_lost([record.sample_id])
            now = self.session.find([record.sample_id]).get(record.sample_id)
            if now is None or now.state != State.LOST:
                continue  # durable weights contain it by now: its bytes go with the next release
            self._features.free([(record.sample_id, record.ref.generation)])
            given_up += 1
            if self._backpressure.has_credit():
                break
        self._report("made_room", given_up=given_up, needed=needed)

    def _finish(self) -> bool:
        """End the stream, unless prompts are still to be captured; whether this worker is done."""
        if self.session.snapshot().prompts.leased > self._isolation.num_held:
            return False
        self._isolation.finish()
        ended = self.session.end_stream()
        if ended:
            self._report("finished", failed_prompts=self.session.snapshot().prompts.failed)
        return ended

    def _capture(self, group: CaptureGroup) -> int:
        """Capture the group whole, store and commit what is wanted of it; how many were new."""
        started = monotonic()
        group = self._isolation.without_known(group)
        if not group.wanted:
            return 0
        generations = self._reserve(group)
        if generations is None:
            return 0
        try:
            captured = self._answer(group.members)
        except CaptureFailedError as failure:
            self.session.swept(list(generations.values()))  # nothing was written
            self._isolation.find(group, failure)
            return 0
        tensors = {sample.sample_id: sample for sample in captured}
        refs = [self._put(prompt, tensors, generations, group.rendering) for prompt in group.wanted]
        fresh = self.session.commit(refs)
        self._free_unwanted(refs, fresh)
        self._captured = group.wanted[-1]
        self._isolation.succeeded()
        self._report(
            "group",
            group=group.wanted[0].ordinal // self._settings.group_size,
            samples=len(fresh),
            num_tokens=sum(ref.num_tokens for ref in refs),
            seconds=monotonic() - started,
            blocked_seconds=self._backpressure.blocked.seconds,
        )
        return len(fresh)

    def _reserve(self, group: CaptureGroup) -> dict[str, int] | None:
        """The generation that each wanted sample is written under; None if another worker took the room."""
        size = self._backpressure.sample_bytes
        wanted = [Wanted(p.ordinal, self._groups.sample_id(p), size) for p in group.wanted]
        generations = self.session.reserve(wanted, self._backpressure.budget)
        if generations is None:
            self.session.give_back([prompt.ordinal for prompt in group.wanted])
            return None
        return {item.sample_id: number for item, number in zip(wanted, generations, strict=True)}

    def _free_unwanted(self, refs: Sequence[SampleRef], fresh: Sequence[SampleRef]) -> None:
        """Bytes that the ledger did not take: while they were written, the sample was settled otherwise."""
        known = self.session.find([ref.sample_id for ref in refs])
        for ref in refs:
            record = known.get(ref.sample_id)
            if ref not in fresh and (record is None or record.ref.generation != ref.generation):
                self._features.free([(ref.sample_id, ref.generation)])

    def _captured_before(self) -> EncodedPrompt | None:
        return self._captured or self._groups.captured_before()

    # -- capture -----------------------------------------------------------------------------

    def _answer(self, members: Sequence[EncodedPrompt]) -> list[Captured]:
        """Raises CaptureFailedError for whatever the engine raises over its input."""
        requests = [self._request(prompt) for prompt in members]
        try:
            return self.engine.capture(requests, self._settings.features)
        except Exception as error:
            raise as_failure(error) from error

    def _request(self, prompt: EncodedPrompt) -> CaptureRequest:
        s = self._settings
        return CaptureRequest(
            sample_id=self._groups.sample_id(prompt),
            token_ids=prompt.token_ids,
            max_new_tokens=s.max_answer_tokens,
            temperature=s.temperature if prompt.round else s.first_round_temperature,
            seed=sample_seed(s.seed, prompt.ordinal),
        )

    def _put(
        self,
        prompt: EncodedPrompt,
        captured: Mapping[str, Captured],
        generations: Mapping[str, int],
        rendering: str,
    ) -> SampleRef:
        sample_id = self._groups.sample_id(prompt)
        sample, generation = captured[sample_id], generations[sample_id]
        sealed = self._features.put(sample_id, sample.tensors, generation=generation)
        facts, tokens = self.engine.facts, sample.tensors[name_of(Tokens, self._settings.features)]
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
                "greedy": self._request(prompt).temperature == 0.0,
            },
            generation=generation,
            ordinal=prompt.ordinal,
        )


def sample_seed(run_seed: int, ordinal: int) -> int:
    """A seed of its own for every sample, below 2**63."""
    digest = hashlib.sha256(f"{run_seed}:{ordinal}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
