"""A run's draft from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Collection

from paceline.config.run import RunConfig
from paceline.errors import CheckpointDamagedError, CheckpointError
from paceline.ledger.stores.sqlite.view import LedgerView
from paceline.training.checkpoint import Checkpoint, CheckpointFolder


def newest_checkpoint(config: RunConfig, view: LedgerView, only: Collection[str]) -> Checkpoint:
    """The newest valid checkpoint of a run, files of the names in `only`. Raises CheckpointError if it
    has none."""
    folder = CheckpointFolder(config.checkpoint_folder, config.run.name)
    damaged = ""
    for record in reversed(view.snapshot().checkpoints):
        try:
            return folder.read(record, only)
        except CheckpointDamagedError as error:
            damaged = damaged or error.what  # the one before it is as good as it was
    if damaged:
        raise CheckpointError(
            f"The run in {config.run.directory} has no checkpoint that can be read. {damaged}",
            why="There is no draft to measure.",
            next=f"paceline fsck {config.run.directory}, which says what is wrong with each of them.",
        )
    raise CheckpointError(
        f"The run in {config.run.directory} has no valid checkpoint yet.",
        why="There is no draft to measure.",
        next="train first: paceline train RUN.yaml",
    )
