"""A small run trained by several ranks, each a fork with gloo over loopback; any may be killed or stopped.

Call it in a process that has computed nothing yet (forked_starts.py): forks share its imports.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from paceline.crashpoints import watch
from paceline.errors import PacelineError
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.roles.trainers import MeetingPoint, place_in
from paceline.testing.kill_points import Armed, pointed
from paceline.testing.small_run import RUN_ID, SmallRun
from paceline.testing.synthetic import synthetic_head
from paceline.training import tensor_files
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.group import Group
from paceline.training.learner import DRAFT
from paceline.training.part_writing import PartWriter
from paceline.training.ranks import Follower, hear_begin
from paceline.training.torch_learner import TorchLearner
from paceline.training.trainer import Trainer
from paceline.training.worker import Worker

BUDGET_BYTES = 8 << 20
SHARDED = "sharded"


@dataclass(frozen=True)
class Strike:
    """`victim` (a rank, or a producer's role) gets the signal at `point`, reached for the `turn`-th time."""

    victim: int | str = -1
    point: str = ""
    turn: int = 1
    number: signal.Signals = signal.SIGKILL

    def arm(self) -> None:
        watch(Armed(self.point, self.turn, self.number))


def one_attempt(
    folder: Path,
    ranks: int,
    strike: Strike | None = None,
    *,
    timeout_s: float = 60.0,
    prepare: Callable[[SmallRun], None] = lambda _: None,
    **shape: Any,
) -> list[int]:
    """All ranks from the newest checkpoint on, until each has ended; their exit codes, in rank order.

    Rank 0 also captures. A rank that was stopped is killed once the others have ended. `prepare` is called in
    each rank before it begins; `shape`: of the run. The weights of a run that came to its end lie in
    final.safetensors.
    """
    meeting = MeetingPoint(ranks)
    pids: dict[int, int] = {}
    for rank in range(ranks):
        armed = strike if strike is not None and strike.victim == rank else None
        pids[forked(folder, partial(_rank, meeting.environment(rank), timeout_s, prepare), armed, shape)] = (
            rank
        )
    meeting.close()
    codes: dict[int, int] = {}
    while len(codes) < ranks:
        stopped = strike is not None and strike.number == signal.SIGSTOP
        if stopped and len(codes) == ranks - 1:
            [late] = [pid for pid, rank in pids.items() if rank not in codes]
            os.kill(late, signal.SIGKILL)
        pid, status = os.wait()
        codes[pids[pid]] = os.waitstatus_to_exitcode(status)
    return [codes[rank] for rank in range(ranks)]


def forked(
    folder: Path, work: Callable[[SmallRun], None], strike: Strike | None, shape: Mapping[str, Any]
) -> int:
    """Fork a process of the run; returns its id. What it ended with is told in the folder.

    `shape`: of the run, and under "sharded" whether ranks divide the draft among them.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        if strike is not None:
            strike.arm()
        run = SmallRun(folder, **{name: value for name, value in shape.items() if name != SHARDED})
        run.sharded = bool(shape.get(SHARDED))
        work(run)
        code = 0
    except PacelineError as error:
        (folder / f"ended-{os.getpid()}.txt").write_text(str(error))
        code = error.exit_code
    except BaseException:  # noqa: BLE001 (a fork must not return into its parent's stack)
        (folder / f"broken-{os.getpid()}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _rank(
    environment: Mapping[str, str], timeout_s: float, prepare: Callable[[SmallRun], None], run: SmallRun
) -> None:
    group, store = join(run, environment, timeout_s, captures=True)
    prepare(run)
    if group is not None and group.rank:
        follow(run, group)
        return
    trainer = run.run(group)
    trainer.ranks.end()
    finish(run, trainer, store)


def join(
    run: SmallRun, environment: Mapping[str, str], timeout_s: float, *, captures: bool
) -> tuple[Group | None, SharedMemoryFeatureStore]:
    """`captures`: rank 0 is also the producer."""
    place = place_in(environment)
    is_first = place is None or place.rank == 0
    store = open_store(run, owner=captures and is_first)
    device = torch.device("cpu")
    return None if place is None else Group(place, timeout_s=timeout_s, device=device), store


def open_store(run: SmallRun, *, owner: bool, writer: int = 0) -> SharedMemoryFeatureStore:
    folder = run.folder / "features"
    run.features = store = SharedMemoryFeatureStore(
        folder, budget_bytes=BUDGET_BYTES, owner=owner, writer=writer
    )
    return store


def follow(run: SmallRun, group: Group) -> None:
    """As a rank other than 0."""
    hear_begin(group)
    learner = TorchLearner(run.method, synthetic_head(), run.settings, group)
    worker = Worker(pointed(learner, "learner"), pointed(run.features, "features"))
    with ThreadPoolExecutor(1) as executor:
        checkpoints = CheckpointFolder(run.folder / "checkpoints", RUN_ID)
        writer = PartWriter(group.rank, checkpoints, executor) if run.sharded else None
        Follower(worker, group, lambda: False, writer).follow()


def finish(run: SmallRun, trainer: Trainer, store: SharedMemoryFeatureStore) -> None:
    """Check that nothing stays behind, and keep the weights of the newest checkpoint, whole."""
    assert store.usage().resident_samples == 0, "nothing may stay behind"
    checkpoints = CheckpointFolder(run.folder / "checkpoints", RUN_ID)
    files = checkpoints.read(trainer.session.checkpoints()[-1]).files
    save_file(tensor_files.read(DRAFT, files), run.folder / "final.safetensors")
