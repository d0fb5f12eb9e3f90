"""A run's draft method, and its draft from a checkpoint: what consumer and evaluator share."""

from __future__ import annotations

from paceline.config.run import RunConfig
from paceline.errors import CheckpointDamagedError, CheckpointError
from paceline.ledger.store import MetadataStore
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.method import DraftMethod
from paceline.training.checkpoint import Checkpoint, CheckpointFolder


def build_method(config: RunConfig) -> DraftMethod:
    section = config.method
    return Eagle3Method(
        {
            "draft_vocab_size": section.draft_vocab_size,
            "ttt_steps": section.ttt_steps,
            "step_decay": section.step_decay,
            "recompute": section.recompute,
            "init": section.init,
        }
    )


def newest_checkpoint(config: RunConfig, store: MetadataStore) -> Checkpoint:
    """The newest valid checkpoint of a run. Raises CheckpointError if it has none."""
    folder = CheckpointFolder(config.checkpoint_folder, config.run.name)
    for record in reversed(store.checkpoints()):
        try:
            return folder.read(record)
        except CheckpointDamagedError:
            continue  # damaged; the one before it is as good as it was
    raise CheckpointError(
        f"The run in {config.run.directory} has no valid checkpoint yet.",
        why="There is no draft to measure.",
        next="train first: paceline train RUN.yaml",
    )
