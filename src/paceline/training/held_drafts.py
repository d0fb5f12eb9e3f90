"""The drafts that are held beyond a run's newest checkpoints: the best one, and one that is being measured.

They lie in `checkpoints/best`, each as a folder of its checkpoint's name with the manifest and the draft's
file, or all parts of it: hard links, which cost no bytes while the checkpoint is there and outlive its
removal. A process that holds a draft asks none for it, so training never waits. No recovery looks there: a
run goes on from its newest checkpoint, not from its best. No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from paceline import durable_files
from paceline.crashpoints import reach
from paceline.ledger.records import CheckpointRecord
from paceline.parts import parts_of
from paceline.training.checkpoint import MANIFEST, NAME, Checkpoint, CheckpointFolder

BEST = "best"


class HeldDrafts:
    def __init__(self, checkpoints: Path, run_id: str, draft: str) -> None:
        """`draft`: the name of the draft's file in a checkpoint."""
        self.folder = checkpoints / BEST
        self._checkpoints, self._run_id, self._draft = checkpoints, run_id, draft

    def names(self) -> set[str]:
        """As `held_names`."""
        return held_names(self._checkpoints)

    def read(self, record: CheckpointRecord) -> Checkpoint:
        """The draft and the values of its checkpoint. Raises as `CheckpointFolder.read` does."""
        return CheckpointFolder(self.folder, self._run_id).read(record, (self._draft,))

    def hold(self, record: CheckpointRecord) -> None:
        """Hold the draft of a checkpoint; durable on return.

        Raises FileNotFoundError if the checkpoint is not there (any more), OSError if the disk fails.
        """
        if record.name in self.names():
            return
        names = self._files_of(self._checkpoints / record.name)
        held = CheckpointFolder(self.folder, self._run_id)
        held.sweep(self.names())  # what a crash left half-held
        aside = self.folder / f"{record.name}.new"
        aside.mkdir(mode=0o700)
        for name in names:
            _link(self._checkpoints / record.name / name, aside / name)
        durable_files.sync_folder(aside)
        reach("held.before_rename")
        aside.rename(self.folder / record.name)
        durable_files.sync_folder(self.folder)

    def _files_of(self, checkpoint: Path) -> list[str]:
        try:
            return [MANIFEST, *parts_of(self._draft, [path.name for path in checkpoint.iterdir()])]
        except KeyError as error:
            raise FileNotFoundError(f"{checkpoint} lacks {error.args[0]}") from error

    def release(self, keep: Collection[str]) -> None:
        """Hold no other drafts than those. Raises CheckpointError if the disk fails."""
        if self.folder.is_dir():
            CheckpointFolder(self.folder, self._run_id).sweep(set(keep))


def held_names(checkpoints: Path) -> set[str]:
    """The names of the checkpoints whose drafts are held. Raises OSError."""
    try:
        return {path.name for path in (checkpoints / BEST).iterdir() if NAME.fullmatch(path.name)}
    except FileNotFoundError:
        return set()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links, or a folder that was moved to another disk
        durable_files.write_file(target, source.read_bytes())
