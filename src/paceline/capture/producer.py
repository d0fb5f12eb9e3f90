"""The producer's loop: wait for credit, lease prompts, answer and capture, store, commit.

Prompts are captured in fixed groups (the g-th `group_size` of the run's prompt order), because
the bits of a captured state depend on the batch it was computed in. A group that is captured
again, after a crash or because a feature was lost, is computed whole and gives the same bits;
only the samples that are wanted are stored. Commits happen in prompt order, so the committed log,
and with it every step plan, is the same in every run of the same configuration. A prompt that the
engine cannot bear is found (blame.py) and set aside with its reason; its group goes on without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from paceline.capture.backpressure import Backpressure
from paceline.capture.blame import ENGINE_FAILURES, Blame
from paceline.capture.prompts import UNREADABLE
from paceline.engines.engine import Captured, CaptureRequest, TargetEngine
from paceline.errors import LedgerError
from paceline.features.store import FeatureStore
from paceline.ledger.channel import CommittedRefLog
from paceline.ledger.controller import DataFlowController
from paceline.ledger.records import Fence
from paceline.types import Feature, PromptTask, SampleRef, Tokens, name_of


@dataclass(frozen=True)
class CaptureSettings:
    """`num_prompts` is the size of the prompt set: from its end on, answers are sampled.

    `features`: what the draft's method trains on, as `DraftMethod.features` gave it.
    """

    group_size: int
    num_prompts: int
    max_answer_tokens: int
    features: tuple[Feature, ...]
    first_round_temperature: float = 0.0
    temperature: float = 0.8
    seed: int = 0
    strategy: str = "eagle3"


class Producer:
    def __init__(
        self,
        controller: DataFlowController,
        engine: TargetEngine,
        features: FeatureStore,
        tasks: Sequence[PromptTask],
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
        self._tasks = [replace(task, ordinal=place) for place, task in enumerate(tasks)]
        self._settings = settings
        self._backpressure = backpressure
        self._report = report
        self._log = CommittedRefLog(controller.store)
        self._fence: Fence | None = None
        self._blame = Blame(controller, worker_id, engine.probe, report)
        controller.ingest_prompts(tasks)

    def run(self, max_rounds: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """Capture until no prompt is pending, then close the stream; samples committed by this call.

        Takes the producer role first: leases of an earlier producer, or of a call that failed,
        return. A stop or `max_rounds` leaves the stream open: whoever comes next goes on from there.
        """
        stop = should_stop or (lambda: False)
        self._take_over()
        committed, rounds = 0, 0
        while not stop() and (max_rounds is None or rounds < max_rounds):
            if not self._backpressure.wait_for_credit(stop, self._fence, self._make_room_for_lost):
                return committed
            size = self._settings.group_size
            wanted = self.controller.lease_prompt_tasks(self.worker_id, size, group_size=size)
            if not wanted:
                self._finish()
                return committed
            committed += self._capture(wanted)
            rounds += 1
        return committed

    def _take_over(self) -> None:
        """Become the producer, free what a dead one never committed, and report what is gone.

        Taking the role revokes every byte intent, in one transaction; only then are bytes deleted.
        """
        store = self.controller.store
        self._fence = self._log.fence = self.controller.take_role("producer")
        if self._log.is_closed() and store.task_counts()["pending"] > len(store.lost_ids()):
            self._log.reopen()  # prompts were added; a sample captured again adds nothing to the log
        # A ledger that is an older copy never gave out some generations that lie here. They are nobody's,
        # since this was the producer when it looked, and never to be given out again.
        newest = self._features.newest_generation()
        if newest >= self._fence.generation:
            self._fence = self._log.fence = self.controller.skip_generations(newest)
        keep = store.present_generations()
        orphans = self._features.sweep(keep=keep, before=self._fence.generation)
        # After a reboot the ledger knows samples that the memory forgot: all are reported at once.
        here = set(self._features.sample_ids())
        gone = [i for i in store.present_ids() if i not in here]
        if gone:
            store.report_lost(gone, fence=self._fence)
        self._report("started", orphans=len(orphans), lost=len(gone), epoch=self._fence.epoch)

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
            self._features.abort(sample_id, reason="makes room for a sample that is needed first")
            given_up.append(sample_id)
            if self._backpressure.has_credit():
                break
        self._report("made_room", given_up=len(given_up), needed=lost[0])

    def _finish(self) -> None:
        counts = self.controller.store.task_counts()
        if counts["leased"] == 0:
            self._log.close()
        self._report("finished", failed_prompts=counts["failed"])

    def _capture(self, wanted: Sequence[PromptTask]) -> int:
        """Capture the group of `wanted` whole, store and commit the wanted; how many were new."""
        started = monotonic()
        group = wanted[0].ordinal // self._settings.group_size
        readable = self._blame.set_aside_unreadable(wanted, UNREADABLE)
        if not readable:
            return 0
        members = self._members(group, readable[0])
        convicted = self._blame.try_deadly(readable, members, self._answer)
        readable = [task for task in readable if task.task_id not in convicted]
        members = [task for task in members if task.task_id not in convicted]
        if not readable:
            return 0
        size = self._backpressure.sample_bytes
        generations = self.controller.reserve({sample_id(task): size for task in readable})
        try:
            captured = self._answer(members)
        except ENGINE_FAILURES as error:
            self.controller.revoke(list(generations.values()))
            self._blame.find(readable, members, self._answer, error)
            return 0
        by_id = {sample.sample_id: sample for sample in captured}
        refs = [self._store(task, by_id[sample_id(task)], generations[sample_id(task)]) for task in readable]
        fresh = self.controller.commit_samples(self.worker_id, refs)
        self._free_unwanted(refs, fresh)
        self._report(
            "group",
            group=group,
            samples=len(fresh),
            num_tokens=sum(ref.num_tokens for ref in refs),
            seconds=monotonic() - started,
            blocked_seconds=self._backpressure.blocked.seconds,
        )
        return len(fresh)

    def _free_unwanted(self, refs: Sequence[SampleRef], fresh: Sequence[SampleRef]) -> None:
        """Bytes that the ledger did not take: while they were written, the sample was settled otherwise."""
        for ref in refs:
            if ref in fresh:
                continue
            known = self.controller.store.get_committed(ref.sample_id)
            if known is None or known.generation != ref.generation:
                self._features.abort(ref.sample_id, reason="not wanted any more", generation=ref.generation)

    def _members(self, group: int, wanted: PromptTask) -> list[PromptTask]:
        """The group's prompts but those set aside for good: the same ones whenever it is captured."""
        first = group * self._settings.group_size
        slice_of_run = self._tasks[first : first + self._settings.group_size]
        there = slice_of_run[wanted.ordinal - first].task_id
        if there != wanted.task_id:
            raise LedgerError(
                f"Prompt {wanted.ordinal} of the ledger is {wanted.task_id!r}, but this producer was "
                f"given {there!r} there.",
                why="Groups are slices of the prompt order; another order gives other features.",
                next="pass the prompts the run was started with, in the same order.",
            )
        failed = self.controller.store.failed_tasks()
        return [task for task in slice_of_run if task.task_id not in failed]

    def _answer(self, members: Sequence[PromptTask]) -> list[Captured]:
        requests = [self._request(task) for task in members]
        return self.engine.capture(requests, self._settings.features)

    def _request(self, task: PromptTask) -> CaptureRequest:
        s = self._settings
        greedy_round = task.ordinal < s.num_prompts
        return CaptureRequest(
            sample_id=sample_id(task),
            token_ids=tuple(task.payload["prompt_ids"]),
            max_new_tokens=s.max_answer_tokens,
            temperature=s.first_round_temperature if greedy_round else s.temperature,
            seed=sample_seed(s.seed, task.ordinal),
        )

    def _store(self, task: PromptTask, sample: Captured, generation: int) -> SampleRef:
        sealed = self._features.put(sample.sample_id, sample.tensors, generation=generation)
        facts, tokens = self.engine.facts, sample.tensors[name_of(Tokens, self._settings.features)]
        return SampleRef(
            sample_id=sample.sample_id,
            run_id=self.controller.run_id,
            source_task_id=task.task_id,
            feature_store_uri=sealed.uri,
            feature_keys=sealed.keys,
            feature_specs=sealed.specs,
            strategy=self._settings.strategy,
            num_tokens=int(tokens.shape[0]) - 1,  # that the target processed
            estimated_bytes=sealed.num_bytes,
            target_model_version=facts.model_version,
            tokenizer_version=facts.tokenizer_version,
            metadata={"digest": sealed.digest},
            generation=generation,
        )


def sample_id(task: PromptTask) -> str:
    """A sample's identity is its prompt's: `run:task`. The same after any number of restarts."""
    return f"{task.run_id}:{task.task_id}"


def sample_seed(run_seed: int, ordinal: int) -> int:
    """A seed of its own for every sample, below 2**63."""
    digest = hashlib.sha256(f"{run_seed}:{ordinal}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
