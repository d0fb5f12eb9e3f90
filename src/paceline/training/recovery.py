"""Recovery finds the newest valid checkpoint for a new consumer, and makes ledger and folder agree.

If the head is damaged, the run falls back to the checkpoint before it: samples released since are captured
again, and unrecorded checkpoints that follow the damaged one are not used. If the ledger is older than the
folder (a crash between the rename and the record of the head, or a ledger that lost its last transactions),
it is rolled forward from the checkpoint's lineage, provided that the lineage continues what the ledger
knows. If it does not, and the ledger is the older one, the run stops: neither can be trusted alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paceline.errors import CheckpointDamagedError, CheckpointError, IllegalTransitionError, LedgerError
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.facts import DAMAGED_CHECKPOINTS
from paceline.ledger.records import CONSUMER, CheckpointRecord
from paceline.loader.passes import START, Position
from paceline.training.checkpoint import Checkpoint, CheckpointFolder, identity_of

Found = tuple[CheckpointRecord, Checkpoint]


@dataclass(frozen=True)
class Start:
    """The checkpoint that a new consumer goes on from; None before the run's first."""

    head: CheckpointRecord | None = None
    checkpoint: Checkpoint | None = None

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def position(self) -> Position:
        """How much of the log the weights contain."""
        return Position(*self.checkpoint.values["position"]) if self.checkpoint else START


def recover(session: ConsumerSession, folder: CheckpointFolder, report: Callable[..., None]) -> Start:
    """Take the consumer role, which fences every older consumer, and find the start.

    Raises as `find_checkpoint` does.
    """
    epoch_before = session.snapshot().epochs.get(CONSUMER, 0)
    session.acquire()
    found = find_checkpoint(session, folder, epoch_before, report)
    return Start(*(found or ()))


def find_checkpoint(
    session: ConsumerSession,
    folder: CheckpointFolder,
    epoch_before: int,
    report: Callable[..., None],
) -> Found | None:
    """The checkpoint to go on from, which is then the ledger's head; None if the run has none.

    `epoch_before`: the epoch of the consumer before this one. Raises CheckpointError if no checkpoint is
    valid, or if one cannot be read now; LedgerError if the ledger is older than a checkpoint that
    contradicts it.
    """
    found = _newest_valid(session, folder, report)
    if found is not None:
        _refuse_foreign(session, *found, folder)
    while (following := _adopt_next(session, folder, epoch_before, found)) is not None:
        found = following
        report("rolled_forward", step=found[0].step, steps=len(found[1].lineage))
    return found


def _newest_valid(
    session: ConsumerSession, folder: CheckpointFolder, report: Callable[..., None]
) -> Found | None:
    records = session.checkpoints()
    for record in reversed(records):
        try:
            checkpoint = folder.read(record)
        except CheckpointDamagedError as error:
            report("checkpoint_damaged", step=record.step, message=str(error))
            continue
        if record != records[-1]:
            damaged = [identity_of(newer.name) for newer in records if newer.step > record.step]
            known = session.facts().get(DAMAGED_CHECKPOINTS, [])
            session.set_facts({DAMAGED_CHECKPOINTS: sorted({*known, *damaged})})
            lost = session.fall_back(record.step)
            report("fall_back", step=record.step, lost_samples=len(lost))
        return record, checkpoint
    if records:
        whole = [record for record, _ in folder.unrecorded(records) if record.step > records[-1].step]
        if whole:
            raise _ledger_forgot(records, whole, folder)
        raise CheckpointError(
            f"None of the {len(records)} checkpoints in {folder.folder} is valid.",
            why="Starting over would train every sample a second time under the same run.",
            next="restore the folder from a backup, or start a new run.",
        )
    return None


def _adopt_next(
    session: ConsumerSession, folder: CheckpointFolder, epoch_before: int, head: Found | None
) -> Found | None:
    """Adopt the unrecorded checkpoint that continues `head` and return it; None if there is none."""
    head_step, head_name = (head[0].step, head[0].name) if head else (-1, "")
    damaged = set(session.facts().get(DAMAGED_CHECKPOINTS, []))
    listed = folder.unrecorded(session.checkpoints())
    if listed:  # this consumer still holds the role, so no listed folder is a successor's
        session.refuse_if_replaced()
    for record, checkpoint in listed:
        previous = identity_of(checkpoint.previous)
        if record.step <= head_step:
            continue
        if previous in damaged:
            damaged.add(identity_of(record.name))  # it follows a damaged one and will be swept
            continue
        try:
            _refuse_foreign(session, record, checkpoint, folder)
            if previous != identity_of(head_name):
                raise IllegalTransitionError(f"It follows {checkpoint.previous!r}, which is not the head.")
            claimed = folder.claim(record, session.epoch)
            if claimed is None:  # the predecessor swept or claimed it
                return _adopt_next(session, folder, epoch_before, head)
            checkpoint = folder.read(claimed, names=())  # the files now lie under the claimed name
            session.adopt(claimed, checkpoint.lineage)
        except IllegalTransitionError as error:
            if checkpoint.epoch > epoch_before or checkpoint.lsn > session.lsn():
                raise _ledger_is_older(record, folder, error) from error
            continue  # a replaced consumer wrote it and could not record it
        return claimed, checkpoint
    return None


def _refuse_foreign(
    session: ConsumerSession, record: CheckpointRecord, checkpoint: Checkpoint, folder: CheckpointFolder
) -> None:
    """Raise LedgerError if the checkpoint was written with another ledger than this one."""
    if checkpoint.ledger and checkpoint.ledger not in session.identities:
        raise LedgerError(
            f"Checkpoint {record.name} (step {record.step}) in {folder.folder} was written with ledger "
            f"{checkpoint.ledger[:8]}, and this one is {next(iter(session.identities), 'unknown')[:8]}.",
            why="The weights contain what this ledger would train again, or they are another run's.",
            next="put back the ledger that belongs to the checkpoints, or start a new run.",
        )


def _ledger_is_older(
    record: CheckpointRecord, folder: CheckpointFolder, because: IllegalTransitionError
) -> LedgerError:
    return LedgerError(
        f"The ledger is older than checkpoint {record.name} (step {record.step}) in {folder.folder} and "
        f"cannot be rolled forward to it. {because}",
        why="Going on from the ledger alone would train samples again that those weights contain.",
        next=f"restore the ledger's newest backup, or move {record.name} away to lose its steps.",
    )


def _ledger_forgot(
    records: Sequence[CheckpointRecord], whole: list[CheckpointRecord], folder: CheckpointFolder
) -> LedgerError:
    names = ", ".join(f"{record.name} (step {record.step})" for record in whole)
    return LedgerError(
        f"The ledger is old: the newest checkpoint that it knows is of step {records[-1].step}, and none of "
        f"those is in {folder.folder} any more, but newer ones lie there whole: {names}.",
        why="The ledger was restored from an older copy, or has lost its log. Its plans and acks do not "
        "reach these weights, so it cannot go on from them.",
        next="put back the ledger that belongs to them (ledger.db, and ledger.db-wal if there is one; or the "
        "server's data), and run the same command again; or start a new run.",
    )
