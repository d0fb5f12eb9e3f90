"""What a light run has on its disk, looked at and damaged from outside while it goes on."""

from __future__ import annotations

import random
import shutil

from paceline.errors import CheckpointError, PacelineError
from paceline.ledger.records import Snapshot
from paceline.testing.light_run import RUN_ID, LightRun
from paceline.training.checkpoint import CheckpointFolder


def damage_head(run: LightRun, rng: random.Random) -> bool:
    """Delete or alter the newest checkpoint on record, if a whole one is left to fall back to."""
    now = look(run)
    records = () if now is None else now.checkpoints
    checkpoints = CheckpointFolder(run.checkpoints, RUN_ID)
    try:
        checkpoints.read(records[-2])
        folder = run.checkpoints / records[-1].name
        if rng.random() < 0.5:
            shutil.rmtree(folder)
            return True
        path = folder / rng.choice(sorted(file.name for file in folder.iterdir()))
    except (IndexError, CheckpointError, FileNotFoundError):
        return False
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return True


def look(run: LightRun) -> Snapshot | None:
    """What a reader sees: a stopped process may hold the writers' gate. None: the ledger is not begun yet."""
    try:
        view = run.view()
    except PacelineError:
        return None
    try:
        return view.snapshot()
    finally:
        view.close()
