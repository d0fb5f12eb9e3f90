"""The coordinator records acks, quarantine and checkpoints in the ledger: one process for all ranks.

An ack is provisional: it says that the weights in memory contain the step. A checkpoint makes it durable
(checkpoint_writer.py): the features that it covers are freed only once its folder is durable and the ledger
names it head. After a crash the next consumer goes back to the newest valid checkpoint and replays the
recorded plans, so the weights are bit for bit those of a run without the crash. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial

from paceline.errors import TrainingError
from paceline.features.store import FeatureStore
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.facts import CHECKPOINT_WANTED, QUARANTINED_IN_A_ROW
from paceline.loader.planned import PlannedStep
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.checkpoint_writer import CheckpointWriter
from paceline.training.part_writing import PATIENCE_S
from paceline.training.ranks import Ranks
from paceline.training.recovery import Start
from paceline.training.settings import TrainerSettings


class Coordinator:
    def __init__(
        self,
        session: ConsumerSession,
        features: FeatureStore,
        folder: CheckpointFolder,
        ranks: Ranks,
        start: Start,
        settings: TrainerSettings,
        *,
        executor: Executor | None = None,
        report: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """`executor`: writes checkpoints while training goes on; None: training waits for them."""
        self.session = session
        self.step, self.position = start.step, start.position
        self._first_place = start.checkpoint.first_place if start.checkpoint else 0
        self._features = features
        self._ranks = ranks
        self._quarantine_max = settings.training.quarantine_max_in_a_row
        self._in_a_row = int(session.facts().get(QUARANTINED_IN_A_ROW) or 0)
        self._report = report
        self._writer = CheckpointWriter(
            session, features, folder, start, executor, kept=settings.checkpoint.keep, report=report
        )
        if ranks.size > 1:  # they wait for rank 0 no longer than for a step
            self._writer.while_waiting = partial(ranks.beat, PATIENCE_S)
        if ranks.are_sharded:
            self._writer.others = ranks

    def clean_up(self) -> None:
        """Remove what an older consumer left: unrecorded checkpoints, and features that the head covers."""
        self._writer.sweep()
        self.session.release(self._features)

    # -- steps -----------------------------------------------------------------------------

    def ack(self, planned: PlannedStep) -> None:
        """The weights contain the step. A sample is acked at its last visit; no step needs it afterwards."""
        if planned.refs:
            self._count_in_a_row(0)
        self.session.ack(planned.step, planned.rev, [ref.sample_id for ref in planned.finished])
        self.step, self.position, self._first_place = planned.step, planned.after, planned.first_place
        self._writer.add(planned.trained)

    def before_wait(self) -> None:
        """Before a wait for samples: write the last ack, and do what the producer may be waiting for."""
        self.session.write_ack()
        self._ranks.beat()
        self.relieve_pressure()

    # -- checkpoints -----------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Make everything up to this step durable, then free what it covers."""
        self.begin_checkpoint()
        self._writer.settle()

    def begin_checkpoint(self) -> None:
        """Copy the weights; a thread writes them while training goes on."""
        if self.step == self._writer.step:
            return
        position = [self.position.stage, self.position.offset]
        values = {**self._ranks.describe(), "position": position}
        self._writer.begin(self.step, self._first_place, self._ranks.files, values)

    def relieve_pressure(self) -> None:
        """Write a checkpoint early if the producer waits for bytes that only a checkpoint can free."""
        self._writer.poll()
        if self.session.facts().get(CHECKPOINT_WANTED):
            if not self._writer.is_writing:
                self.begin_checkpoint()
            self._writer.settle()

    # -- what fails ------------------------------------------------------------------------

    def quarantine(self, tried: Sequence[str], culprits: Mapping[str, str], *, step: int | None) -> None:
        """Quarantine the culprits among the samples tried, each with its reason.

        Raises TrainingError, and quarantines none, if too many samples in a row would be quarantined.
        """
        if not culprits:
            return
        in_a_row = self._in_a_row
        for sample_id in tried:
            in_a_row = in_a_row + 1 if sample_id in culprits else 0
            if in_a_row > self._quarantine_max:
                raise self._too_many(sample_id, culprits[sample_id])
        self._count_in_a_row(in_a_row)
        for sample_id, reason in culprits.items():
            self.session.quarantine([sample_id], step=step, reason=reason)
            self._report("quarantined", step=step, sample_id=sample_id, message=reason)

    def _count_in_a_row(self, in_a_row: int) -> None:
        """Recorded in the ledger, because the row may continue after a restart."""
        if in_a_row != self._in_a_row:
            self.session.set_facts({QUARANTINED_IN_A_ROW: in_a_row})
            self._in_a_row = in_a_row

    def _too_many(self, sample_id: str, reason: str) -> TrainingError:
        return TrainingError(
            f"{sample_id} cannot be trained ({reason}), and with it more than {self._quarantine_max} samples "
            "in a row would be quarantined.",
            why="So many failures in a row mostly have one cause outside the samples. This sample and those "
            "after it are not quarantined.",
            next="find the cause (`paceline inspect RUN` shows the reasons), mend it, and run the same "
            "command again. If the samples are bad, raise training.quarantine_max_in_a_row.",
        )

    def begin(self, attempt: str, deaths_max: int) -> bool:
        """Count an attempt (a fact's name); False if `deaths_max` consumers have died in it."""
        begun = int(self.session.facts().get(attempt) or 0)
        if begun >= deaths_max:
            return False
        self.session.set_facts({attempt: begun + 1})
        return True

    def end(self, attempt: str) -> None:
        self.session.set_facts({attempt: 0})
