"""The producer's loop: wait for credit, lease prompts, answer and capture, store, commit.

Prompts are captured in fixed groups (the g-th `group_size` of the run's prompt order), because
the bits of a captured state depend on the batch it was computed in. A group that is captured
again, after a crash or because a feature was lost, is computed whole and gives the same bits;
only the samples that are wanted are stored. Commits happen in prompt order, so the committed log,
and with it every step plan, is the same in every run of the same configuration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from paceline.capture.backpressure import Backpressure
from paceline.crashpoints import reach
from paceline.engines.engine import CapturedSample, CaptureRequest, TargetEngine
from paceline.errors import EngineError, LedgerError
from paceline.features.store import FeatureStore
from paceline.ledger.channel import CommittedRefLog
from paceline.ledger.controller import DataFlowController
from paceline.ledger.store import Fence
from paceline.types import PromptTask, SampleRef


@dataclass(frozen=True)
class CaptureSettings:
    """`num_prompts` is the size of the prompt set: from its end on, answers are sampled."""

    group_size: int
    num_prompts: int
    max_answer_tokens: int
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
        self._tasks = tasks
        self._settings = settings
        self._backpressure = backpressure
        self._report = report
        self._log = CommittedRefLog(controller.store)
        self._fence: Fence | None = None
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
            self._make_room_for_lost()
            if not self._backpressure.wait_for_credit(stop, self._fence):
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
        """Become the producer, free what a dead one never committed, and report what is gone."""
        store = self.controller.store
        self._fence = self.controller.take_role("producer")
        counts = store.task_counts()
        if self._log.is_closed() and store.committed_count() + counts["failed"] < sum(counts.values()):
            self._log.reopen()  # prompts were added; a sample captured again adds nothing to the log
        orphans = self._features.sweep(keep=set(store.all_committed_ids()))
        # After a reboot the ledger knows samples that the memory forgot: all are reported at once.
        here = set(self._features.sample_ids())
        gone = [i for i in store.present_ids() if i not in here]
        if gone:
            store.report_lost(gone, fence=self._fence)
        self._report("started", orphans=len(orphans), lost=len(gone), epoch=self._fence.epoch)

    def _make_room_for_lost(self) -> None:
        """The consumer may wait for a lost sample while samples behind it fill the store.

        Those are given up, the last first, until a group fits: features are a cache, and they are
        captured again when the consumer has come closer.
        """
        store = self.controller.store
        lost = store.lost_ids()
        if not lost or self._backpressure.has_credit():
            return
        order = store.all_committed_ids()
        behind = set(order[order.index(lost[0]) + 1 :])
        given_up = []
        for sample_id in reversed([i for i in store.present_ids() if i in behind]):
            self._features.abort(sample_id, reason="makes room for a sample that is needed first")
            given_up.append(sample_id)
            if self._backpressure.has_credit():
                break
        store.report_lost(given_up, fence=self._fence)
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
        first = group * self._settings.group_size
        members = self._tasks[first : first + self._settings.group_size]
        if members[wanted[0].ordinal - first].task_id != wanted[0].task_id:
            raise LedgerError(
                f"Prompt {wanted[0].ordinal} of the ledger is {wanted[0].task_id!r}, but this producer was "
                f"given {members[wanted[0].ordinal - first].task_id!r} there.",
                why="Groups are slices of the prompt order; another order gives other features.",
                next="pass the prompts the run was started with, in the same order.",
            )
        try:
            captured = self.engine.capture([self._request(task, first + i) for i, task in enumerate(members)])
        except EngineError as error:
            if any(self.controller.store.is_committed(sample_id(task)) for task in wanted):
                raise  # a committed sample is never given up; the leases return with the next start
            buried = self.controller.fail_prompt_tasks(
                self.worker_id, [task.task_id for task in wanted], str(error), retryable=True
            )
            self._report("group_failed", group=group, buried=len(buried), message=str(error))
            return 0
        by_id = {sample.sample_id: sample for sample in captured}
        refs = [self._store(task, by_id[sample_id(task)]) for task in wanted]
        reach("producer.before_commit")
        fresh = self.controller.commit_samples(self.worker_id, refs)
        reach("producer.after_commit")
        self._report(
            "group",
            group=group,
            samples=len(fresh),
            num_tokens=sum(ref.num_tokens for ref in refs),
            seconds=monotonic() - started,
            waited_seconds=self._backpressure.waited_s,
        )
        return len(fresh)

    def _request(self, task: PromptTask, ordinal: int) -> CaptureRequest:
        s = self._settings
        greedy_round = ordinal < s.num_prompts
        return CaptureRequest(
            sample_id=sample_id(task),
            prompt_ids=tuple(task.payload["prompt_ids"]),
            max_new_tokens=s.max_answer_tokens,
            temperature=s.first_round_temperature if greedy_round else s.temperature,
            seed=sample_seed(s.seed, ordinal),
        )

    def _store(self, task: PromptTask, sample: CapturedSample) -> SampleRef:
        if self.controller.store.is_committed(sample.sample_id):
            # A lost sample: what may be left of its old bytes must not be taken for the new ones.
            self._features.abort(sample.sample_id, reason="captured again")
        sealed = self._features.put(
            sample.sample_id,
            {
                "input_ids": sample.input_ids,
                "loss_mask": sample.loss_mask,
                "aux_hidden_states": sample.aux_hidden_states,
                "last_hidden_states": sample.last_hidden_states,
            },
        )
        facts = self.engine.facts
        return SampleRef(
            sample_id=sample.sample_id,
            run_id=self.controller.run_id,
            source_task_id=task.task_id,
            feature_store_uri=sealed.uri,
            feature_keys=sealed.keys,
            feature_specs=sealed.specs,
            strategy=self._settings.strategy,
            num_tokens=int(sample.input_ids.shape[0]),
            estimated_bytes=sealed.num_bytes,
            target_model_version=facts.model_version,
            tokenizer_version=facts.tokenizer_version,
            metadata={"digest": sealed.digest},
        )


def sample_id(task: PromptTask) -> str:
    """A sample's identity is its prompt's: `run:task`. The same after any number of restarts."""
    return f"{task.run_id}:{task.task_id}"


def sample_seed(run_seed: int, ordinal: int) -> int:
    """A seed of its own for every sample, below 2**63."""
    digest = hashlib.sha256(f"{run_seed}:{ordinal}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
