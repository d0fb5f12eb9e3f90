"""The parts of a checkpoint that ranks other than 0 write, and how rank 0 hears of them.

A rank copies its part, and its executor's thread writes it while training goes on. What it has written, or
why it could not, goes to rank 0 with the rank's next answer. Rank 0 writes the manifest once it has heard of
all.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, Future, wait
from pathlib import Path

import msgspec

from paceline.durable_files import FileContent
from paceline.errors import CheckpointError, PacelineError
from paceline.training.checkpoint import Checkpoint, CheckpointFolder, FileEntry
from paceline.training.told_errors import ToldError, raised_again, told

PATIENCE_S = 0.2  # while rank 0 waits for parts, an answer may wait so long for its rank's


class WrittenPart(msgspec.Struct, omit_defaults=True):
    """`files`: bytes and SHA-256 by name. `error`: why there are none."""

    files: dict[str, tuple[int, str]] = {}
    error: ToldError | None = None


class PartWriter:
    """On a rank other than 0: writes its part of one checkpoint at a time."""

    def __init__(self, rank: int, folder: CheckpointFolder, executor: Executor) -> None:
        self._rank, self._folder, self._executor = rank, folder, executor
        self._writing: Future[dict[str, FileEntry]] | None = None

    def begin(self, aside: str, files: Mapping[str, FileContent]) -> None:
        """Write `files` into the folder that rank 0 has set aside. Raises CheckpointError."""
        self._refuse_elsewhere(aside)
        self._writing = self._executor.submit(self._folder.write_files, aside, files)

    def read(self, name: str, digest: str) -> Checkpoint:
        """A checkpoint that rank 0 has read. Raises CheckpointError, CheckpointDamagedError."""
        self._refuse_elsewhere(name)
        return self._folder.open(name, digest)

    def told(self, *, patience_s: float) -> WrittenPart | None:
        """What was written since the last call, if all of it is; waits for it at most `patience_s`."""
        if self._writing is None or wait([self._writing], patience_s).not_done:
            return None
        writing, self._writing = self._writing, None
        try:
            entries = writing.result()
        except PacelineError as error:
            return WrittenPart(error=told(error))
        return WrittenPart({name: (entry.num_bytes, entry.sha256) for name, entry in entries.items()})

    def _refuse_elsewhere(self, name: str) -> None:
        if not (self._folder.folder / name).is_dir():
            raise not_shared(self._rank, self._folder.folder, name)


def not_shared(rank: int, folder: Path, name: str = "") -> CheckpointError:
    """`name`: of a checkpoint, or of one that is being written, in rank 0's folder of checkpoints."""
    return CheckpointError(
        f"Rank {rank} does not find {folder / name}, which rank 0 has.",
        why="With machine.shard every rank writes and reads its own part of a checkpoint.",
        next=f"mount rank 0's {folder} at that path on every host, or set machine.shard: false, and run the "
        "same command again.",
    )


class PartsOfOthers:
    """On rank 0: what the other ranks have written of one checkpoint."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._heard: dict[int, WrittenPart] = {}

    def hear(self, rank: int, part: WrittenPart) -> None:
        self._heard[rank] = part

    def entries(self) -> dict[str, FileEntry] | None:
        """Of the files of all other ranks; None before all have told. Raises what one of them failed of."""
        for rank, part in self._heard.items():
            if part.error is not None:
                raise raised_again(part.error, rank)
        if len(self._heard) < self._ranks - 1:
            return None
        return {
            name: FileEntry(name, *content)
            for _, part in sorted(self._heard.items())
            for name, content in part.files.items()
        }
