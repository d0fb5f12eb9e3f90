"""A small run trained by several ranks, each a fork with gloo over loopback; any may be killed or stopped.

Call it in a process that has computed nothing yet (forked_starts.py): forks share its imports.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from paceline.crashpoints import watch
from paceline.errors import PacelineError
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.roles.trainers import MeetingPoint, place_in
from paceline.testing.kill_points import Armed, pointed
from paceline.testing.small_run import SmallRun, weights
from paceline.testing.synthetic import synthetic_head
from paceline.training.group import Group
from paceline.training.ranks import Follower, hear_begin
from paceline.training.torch_learner import TorchLearner
from paceline.training.worker import Worker

BUDGET_BYTES = 8 << 20


@dataclass(frozen=True)
class Strike:
    """`victim` gets the signal when it reaches `point` for the `turn`-th time."""

    victim: int = -1
    point: str = ""
    turn: int = 1
    number: signal.Signals = signal.SIGKILL


def one_attempt(
    folder: Path,
    ranks: int,
    strike: Strike | None = None,
    *,
    timeout_s: float = 60.0,
    prepare: Callable[[int, SmallRun], None] = lambda _, __: None,
    **shape: Any,
) -> list[int]:
    """All ranks from the newest checkpoint on, until each has ended; their exit codes, in rank order.

    A rank that was stopped is killed once the others have ended. `prepare` is called in each rank before it
    begins; `shape`: of the run. The weights of a run that came to its end lie in final.safetensors.
    """
    meeting = MeetingPoint(ranks)
    pids: dict[int, int] = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _life(folder, meeting.environment(rank), strike or Strike(), timeout_s, prepare, shape)
        pids[pid] = rank
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


def _life(
    folder: Path,
    environment: Mapping[str, str],
    strike: Strike,
    timeout_s: float,
    prepare: Callable[[int, SmallRun], None],
    shape: Mapping[str, Any],
) -> None:
    """A rank's. Never returns."""
    code = 1
    try:
        torch.set_num_threads(1)
        place = place_in(environment)
        rank = 0 if place is None else place.rank
        if rank == strike.victim:
            watch(Armed(strike.point, strike.turn, strike.number))
        store = SharedMemoryFeatureStore(folder / "features", budget_bytes=BUDGET_BYTES, owner=rank == 0)
        run = SmallRun(folder, features=store, **shape)
        prepare(rank, run)
        device = torch.device("cpu")
        group = None if place is None else Group(place, timeout_s=timeout_s, device=device)
        if group is None or rank == 0:
            trainer = run.run(group)
            trainer.ranks.end()
            assert store.usage().resident_samples == 0, "nothing may stay behind"
            save_file(weights(trainer), folder / "final.safetensors")
        else:
            hear_begin(group)
            learner = TorchLearner(run.method, synthetic_head(), run.settings, group)
            worker = Worker(pointed(learner, "learner"), pointed(store, "features"))
            Follower(worker, group, lambda: False).follow()
        code = 0
    except PacelineError as error:
        (folder / f"ended-{os.getpid()}.txt").write_text(str(error))
        code = error.exit_code
    except BaseException:  # noqa: BLE001 (a fork must not return into its parent's stack)
        (folder / f"broken-{os.getpid()}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)
