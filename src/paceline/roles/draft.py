"""Finds the checkpoint from which a run's draft is loaded."""

from __future__ import annotations

from collections.abc import Collection

from paceline.config.run import RunConfig
from paceline.errors import CheckpointDamagedError, CheckpointError
from paceline.ledger.stores.sqlite.view import LedgerView
from paceline.training.checkpoint import Checkpoint, CheckpointFolder


def newest_checkpoint(config: RunConfig, view: LedgerView, only: Collection[str]) -> Checkpoint:
    """A run's newest valid checkpoint; only the files `only` are checked. Raises CheckpointError if it has
    none."""
    folder = CheckpointFolder(config.checkpoint_folder, config.run.name)
    damaged = ""
    for record in reversed(view.snapshot().checkpoints):
        try:
            return folder.read(record, only)
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
