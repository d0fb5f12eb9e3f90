"""CheckpointWriter writes a checkpoint while training goes on, and then makes it the head.

`begin` copies the weights, and training waits only for that; the executor's thread writes and syncs the
files. Where the state is divided among ranks, each writes its part, and the manifest follows when all have
told their digests. The rest happens in the trainer's thread at the end of a step: the ledger names the folder
head, and then the features that it covers are freed and older checkpoints are retired. Until then the steps
since the head are provisional. At most one checkpoint is being written. A crash leaves a folder that the next
consumer adopts or sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from paceline.crashpoints import reach
from paceline.durable_files import FileContent
from paceline.errors import CheckpointError, PacelineError
from paceline.features.store import FeatureStore
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.facts import CHECKPOINT_WANTED
from paceline.ledger.records import CheckpointRecord, TrainedStep, chain_of
from paceline.training.checkpoint import Checkpoint, CheckpointFolder, FileEntry
from paceline.training.recovery import Start

WAIT_S = 1.0


class InlineExecutor(Executor):
    """Runs the work in the caller's thread, before `submit` returns."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except PacelineError as error:
            done.set_exception(error)
        return done


class OtherRanks(Protocol):
    """The ranks that write parts of a checkpoint beside this process (ranks.py)."""

    def parts(self, aside: str) -> Mapping[str, FileContent]:
        """A copy of this rank's part; the others have copied theirs, and write them into `aside`."""

    def written(self) -> Mapping[str, FileEntry] | None:
        """What the others have written, by name; None before all have. Raises what one of them failed of."""


@dataclass
class _Begun:
    """`aside`, `own`: the folder of a checkpoint in parts, and the writing of this rank's; else "", None."""

    checkpoint: Checkpoint
    aside: str
    own: Future[dict[str, FileEntry]] | None
    writing: Future[CheckpointRecord] | None
    began: float
    stall_s: float = 0.0


class CheckpointWriter:
    def __init__(
        self,
        session: ConsumerSession,
        features: FeatureStore,
        folder: CheckpointFolder,
        start: Start,
        executor: Executor | None,
        *,
        kept: int,
        report: Callable[..., None],
    ) -> None:
        """`kept`: how many checkpoints stay, with the head. `executor` None: training waits for each."""
        self.head = start.head
        self._session = session
        self._features = features
        self._folder = folder
        self._executor = executor or InlineExecutor()
        self._kept = kept
        self._report = report
        self._begun: _Begun | None = None
        self._since_begun: list[TrainedStep] = []
        self.while_waiting: Callable[[], None] | None = None  # called now and then while a disk is slow
        self.others: OtherRanks | None = None  # that write parts of a checkpoint

    def add(self, trained: TrainedStep) -> None:
        """The weights contain the step."""
        self._since_begun.append(trained)

    @property
    def step(self) -> int:
        """The step of the newest checkpoint, recorded or being written; -1: none."""
        if self._begun is not None:
            return self._begun.checkpoint.step
        return -1 if self.head is None else self.head.step

    @property
    def is_writing(self) -> bool:
        return self._begun is not None

    def begin(
        self,
        step: int,
        first_place: int,
        copy: Callable[[], Mapping[str, FileContent]],
        values: Mapping[str, Any],
    ) -> None:
        """Begin the checkpoint of `step`; one that is still being written is recorded first.

        `first_place`: where a consumer that resumes from it begins to read the log. `copy` copies the
        weights; called once no checkpoint is being written, because the copies share memory.
        """
        self.settle()
        self._session.write_ack()
        began = monotonic()
        head, lineage = self.head, tuple(self._since_begun)
        checkpoint = Checkpoint(
            step=step,
            first_place=first_place,
            files={} if self.others else copy(),
            values=values,
            lineage=lineage,
            previous=head.name if head else "",
            chain=chain_of(head.chain if head else "", [trained.plan for trained in lineage]),
            epoch=self._session.epoch,
            lsn=self._session.lsn(),
            ledger=next(iter(self._session.identities), ""),
        )
        begun = _Begun(checkpoint, "", None, None, began)
        if self.others is None:
            begun.writing = self._executor.submit(self._folder.write, checkpoint)
        else:
            begun.aside = self._folder.set_aside(step, checkpoint.epoch)
            reach("checkpoint.after_aside")
            own = self.others.parts(begun.aside)
            begun.own = self._executor.submit(self._folder.write_files, begun.aside, own)
        begun.stall_s = monotonic() - began
        self._begun, self._since_begun = begun, []

    def poll(self) -> None:
        """Record the checkpoint that is being written, if it is durable by now."""
        if self._begun is not None and self._is_durable(self._begun):
            self.settle()

    def _is_durable(self, begun: _Begun) -> bool:
        """Once all ranks have written their parts, the manifest is begun. Raises CheckpointError."""
        if begun.writing is None:
            assert begun.own is not None
            assert self.others is not None
            try:
                others = self.others.written()
                if others is None or not begun.own.done():
                    return False
                own = begun.own.result()
            except CheckpointError:
                self._folder.discard(begun.aside)
                raise
            begun.writing = self._executor.submit(
                self._folder.seal, begun.aside, begun.checkpoint, own, others
            )
        return begun.writing.done()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, and record it. Raises CheckpointError."""
        begun = self._begun
        if begun is None:
            return
        waited_from = monotonic()
        while not self._is_durable(begun):
            if begun.writing is not None and self.while_waiting is None:
                break  # its result is waited for
            awaited: Future[Any] | None = begun.writing or begun.own
            assert awaited is not None
            is_late = bool(wait([awaited], WAIT_S if self.while_waiting else None).not_done)
            if self.while_waiting and (is_late or begun.writing is None):
                self.while_waiting()  # the other ranks say then whether they have written their parts
        assert begun.writing is not None
        record = begun.writing.result()
        stall_s = begun.stall_s + monotonic() - waited_from
        self._session.head(record)
        self.head, self._begun = record, None
        released = self._session.release(self._features)
        self._retire_old()
        self._session.set_facts({CHECKPOINT_WANTED: False})
        seconds = monotonic() - begun.began
        self._report(
            "checkpoint", step=record.step, released=released, seconds=seconds, stall_seconds=stall_s
        )

    def _retire_old(self) -> None:
        self._session.retire(self._kept)
        self.sweep()

    def sweep(self) -> None:
        """Remove every unrecorded checkpoint. Call it only while none is being written."""
        keep = {record.name for record in self._session.checkpoints()}
        self._folder.sweep(keep, epoch=self._session.epoch)
