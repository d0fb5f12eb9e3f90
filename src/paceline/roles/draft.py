"""Finds the checkpoint from which a run's draft is loaded."""

from __future__ import annotations

from collections.abc import Collection

from paceline.config.run import RunConfig
from paceline.errors import CheckpointDamagedError, CheckpointError
from paceline.ledger.records import CheckpointRecord
from paceline.ledger.stores.sqlite.view import LedgerView
from paceline.training.checkpoint import Checkpoint, CheckpointFolder


def checkpoint_of_step(
    config: RunConfig, view: LedgerView, step: int | None, only: Collection[str]
) -> tuple[Checkpoint, CheckpointRecord]:
    """The kept checkpoint of this step (None: the newest valid one); only the files `only` are checked.

    Raises CheckpointError if there is none, CheckpointDamagedError if it is damaged.
    """
    if step is None:
        return _newest(config, view, only)
    kept = {record.step: record for record in view.snapshot().checkpoints}
    if step not in kept:
        raise CheckpointError(
            f"The run in {config.run.directory} keeps no checkpoint of step {step}.",
            why=f"It keeps those of the steps {', '.join(map(str, sorted(kept))) or 'none'}.",
            next="choose one of them, or leave --step out for the newest.",
        )
    return CheckpointFolder(config.checkpoint_folder, config.run.name).read(kept[step], only), kept[step]


def newest_checkpoint(config: RunConfig, view: LedgerView, only: Collection[str]) -> Checkpoint:
    """A run's newest valid checkpoint; only the files `only` are checked. Raises CheckpointError if it has
    none."""
    return _newest(config, view, only)[0]


def _newest(
    config: RunConfig, view: LedgerView, only: Collection[str]
) -> tuple[Checkpoint, CheckpointRecord]:
    folder = CheckpointFolder(config.checkpoint_folder, config.run.name)
    damaged = ""
    for record in reversed(view.snapshot().checkpoints):
        try:
            return folder.read(record, only), record
        except CheckpointDamagedError as error:
            damaged = damaged or error.what  # the checkpoint before it may be valid
    if damaged:
        raise CheckpointError(
            f"The run in {config.run.directory} has no checkpoint that can be read. {damaged}",
            why="There is no draft to measure.",
            next=f"paceline fsck {config.run.directory} says what is wrong with each of them.",
        )
    raise CheckpointError(
        f"The run in {config.run.directory} has no valid checkpoint yet.",
        why="There is no draft to measure.",
        next="train first: paceline train RUN.yaml",
    )
