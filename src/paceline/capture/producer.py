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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from time import monotonic

from paceline.capture.backpressure import Backpressure
from paceline.capture.encoding import EncodedPrompt, Encoding, PromptLimits
from paceline.capture.groups import CaptureGroup, Groups
from paceline.capture.isolation import FAILURES_IN_A_ROW_MAX, CaptureFailedError, Isolation, as_failure
from paceline.capture.source import PromptSource
from paceline.engines.engine import Captured, CaptureRequest, TargetEngine
from paceline.features.store import FeatureStore, Written
from paceline.ledger.channel import CommittedRefLog
from paceline.ledger.controller import DataFlowController
from paceline.ledger.records import Fence
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
        controller: DataFlowController,
        engine: TargetEngine,
        features: FeatureStore,
        prompts: PromptSource,
        settings: CaptureSettings,
        backpressure: Backpressure,
        *,
        report: Callable[..., None] = lambda *_, **__: None,
        worker_id: str = "producer-0",
    ) -> None:
        self.controller = controller
        self.engine = engine
        self.worker_id = worker_id
        self._features = features
        self._prompts = prompts
        self._settings = settings
        self._backpressure = backpressure
        self._report = report
        self._log = CommittedRefLog(controller.store)
        self._fence: Fence | None = None
        limits = PromptLimits(engine.facts.vocab_size, settings.max_prompt_tokens)
        self.encoding = Encoding(
            engine.encode, limits.for_positions(engine.facts.max_positions, settings.max_answer_tokens)
        )
        self._groups = Groups(controller, prompts, self.encoding, settings.group_size)
        self._captured: EncodedPrompt | None = None  # the last one that this process captured
        self._isolation = Isolation(
            controller,
            worker_id,
            answer=self._answer,
            probe=engine.probe,
            captured_before=self._captured_before,
            report=report,
            in_a_row_max=settings.failures_in_a_row_max,
        )

    def run(self, max_rounds: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """Capture until no prompt is pending, then close the stream; samples committed by this call.

        Takes the producer role first: leases of an earlier producer, or of a call that failed,
        return. A stop or `max_rounds` leaves the stream open: whoever comes next goes on from there.
        """
        stop = should_stop or (lambda: False)
        self._take_over()
        committed, rounds, size = 0, 0, self._settings.group_size
        try:
            while not stop() and (max_rounds is None or rounds < max_rounds):
                if not self._backpressure.wait_for_credit(stop, self._fence, self._make_room_for_lost):
                    break
                leases = self.controller.lease(self.worker_id, size, group_size=size)
                if not leases:
                    self._finish()
                    break
                for _, together in groupby(leases, lambda lease: self._groups.bounds(lease.ordinal)):
                    committed += self._capture(self._groups.group(list(together)))
                rounds += 1
        finally:
            self._isolation.give_back_held()
        return committed

    def _take_over(self) -> None:
        """Become the producer, free what a dead one never committed, and report what is gone.

        Taking the role revokes every byte intent, in one transaction; only then are bytes deleted.
        """
        store = self.controller.store
        self._fence = self._log.fence = self.controller.take_role("producer")
        if self._log.is_closed() and store.task_counts()["pending"] > len(store.lost_ids()):
            self._log.reopen()  # prompts were added; a sample captured again adds nothing to the log
        orphans, gone = self._compare_with_features()
        self._groups.make_known()
        self._groups.bind_rendering()
        if not store.committed_count() and (note := self.encoding.look_for_long(self._prompts)):
            self._report("note", message=note)
        self._report("started", orphans=len(orphans), lost=len(gone), epoch=self._fence.epoch)

    def _compare_with_features(self) -> tuple[list[Written], list[str]]:
        """Free what no sample stands for any more, report what is gone; both. A store that keeps no list is
        left alone.

        Bytes under a generation that this ledger has not given out are either those of a ledger of which
        this one is an older copy, or a successor's. Only the first lets `skip_generations` pass, so nothing
        on the list is a successor's after it.
        """
        assert self._fence is not None, "this is the producer"
        store = self.controller.store
        present, written = store.present_generations(), self._features.written()
        if written is None:
            return [], []
        newest = max((generation for _, generation in written), default=0)
        if newest >= self._fence.generation:
            self._fence = self._log.fence = self.controller.skip_generations(newest)
        orphans = [one for one in written if present.get(one[0]) not in (0, one[1])]
        self._features.free(orphans)
        # After a reboot the ledger knows samples that the memory forgot: all are reported at once.
        here = {sample_id for sample_id, _ in set(written) - set(orphans)}
        gone = [sample_id for sample_id in present if sample_id not in here]
        if gone:
            store.report_lost(gone, fence=self._fence)
        return orphans, gone

    def _make_room_for_lost(self) -> None:
        """The consumer may wait for a lost sample while this producer waits for room.

        Those are given up, the last first, until a group fits: features are a cache, and they are
        captured again when the consumer has come closer.
        """
        store = self.controller.store
        lost = store.lost_ids()
        if not lost or self._backpressure.has_credit():
            return
        needed = store.sample_record(lost[0])
        assert needed is not None, "a lost sample is committed"
        given_up = []
        for entry in reversed(store.read_committed(needed.seq, store.committed_count())):
            sample_id = entry.ref.sample_id
            if not entry.present or entry.quarantined or entry.ref.feature_keys == {}:
                continue
            record = store.sample_record(sample_id)
            if record is None or record.durable:
                continue  # durable weights contain it: its bytes go with the next release
            store.report_lost([sample_id], fence=self._fence)
            if sample_id not in store.lost_ids():
                continue  # they do by now
            self._features.free([(sample_id, entry.ref.generation)])
            given_up.append(sample_id)
            if self._backpressure.has_credit():
                break
        self._report("made_room", given_up=len(given_up), needed=lost[0])

    def _finish(self) -> None:
        self._isolation.finish()
        counts = self.controller.store.task_counts()
        if counts["leased"] == 0 and counts["pending"] == 0:
            self._log.close()
        self._report("finished", failed_prompts=counts["failed"])

    def _capture(self, group: CaptureGroup) -> int:
        """Capture the group whole, store and commit what is wanted of it; how many were new."""
        started = monotonic()
        group = self._isolation.without_known(group)
        if not group.wanted:
            return 0
        try:
            with self._reserved(group) as generations:
                captured = self._answer(group.members)
        except CaptureFailedError as failure:
            self._isolation.find(group, failure)
            return 0
        tensors = {sample.sample_id: sample for sample in captured}
        refs = [self._put(prompt, tensors, generations, group.rendering) for prompt in group.wanted]
        fresh = self.controller.commit_samples(self.worker_id, refs)
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

    @contextmanager
    def _reserved(self, group: CaptureGroup) -> Iterator[dict[str, int]]:
        """The generation that each wanted sample is written under; given up if the capture fails."""
        size = self._backpressure.sample_bytes
        generations = self.controller.reserve(
            {self._groups.sample_id(prompt): size for prompt in group.wanted}
        )
        try:
            yield generations
        except CaptureFailedError:
            self.controller.revoke(list(generations.values()))
            raise

    def _free_unwanted(self, refs: Sequence[SampleRef], fresh: Sequence[SampleRef]) -> None:
        """Bytes that the ledger did not take: while they were written, the sample was settled otherwise."""
        for ref in refs:
            if ref in fresh:
                continue
            known = self.controller.store.get_committed(ref.sample_id)
            if known is None or known.generation != ref.generation:
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
            run_id=self.controller.run_id,
            source_task_id=prompt.task_id,
            feature_store_uri=sealed.uri,
            feature_keys=sealed.keys,
            feature_specs=sealed.specs,
            strategy=self._settings.strategy,
            num_tokens=int(tokens.shape[0]) - 1,  # that the target processed
            estimated_bytes=sealed.num_bytes,
            target_model_version=facts.model_version,
            tokenizer_version=facts.tokenizer_version,
            metadata={"digest": sealed.digest, "digest_kind": sealed.digest_kind, "rendering": rendering},
            generation=generation,
        )


def sample_seed(run_seed: int, ordinal: int) -> int:
    """A seed of its own for every sample, below 2**63."""
    digest = hashlib.sha256(f"{run_seed}:{ordinal}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
