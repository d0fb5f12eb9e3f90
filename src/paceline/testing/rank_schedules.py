"""A small run with 2 ranks and 2 producers as processes, killed and stopped at named points by a seed.

    python -m paceline.testing.rank_schedules --seed 3 [--count 20] [--sharded]

torch, gloo, ledger, shared memory, checkpoints and signals are real. The parent is a supervisor that decides
nothing: if a rank dies all ranks start again, a producer by itself. The run must end in the bits of the
undisturbed run of 2 ranks, with every sample trained and nothing left behind. The seed fixes who is struck
where, not how the processes interleave. Sharded ranks are struck while they write their parts, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file

from paceline.errors import FencedError, RanksError
from paceline.fsck.checker import check as fsck
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles.trainers import MeetingPoint
from paceline.testing.ranks_of_a_run import Strike, finish, follow, forked, join, open_store
from paceline.testing.small_run import SmallRun, same_bits

RANKS, PRODUCERS = 2, 2
SHAPE = {"batch_size": 4, "passes": 2}
TIMEOUT_S = 3.0  # of the ranks; a stopped one is waited for so long
DEADLINE_S = 120.0
STRIKES_MAX = 4
STOPPED = 0.2  # of the strikes on ranks

OF_A_LEARNER = ("learner.step", "learner.files", "learner.fingerprint", "features.get")
OF_RANK_0 = ("ledger.plan", "ledger.head", "ledger.release")
ONCE = ("learner.load.before", "learner.load.after", "ledger.acquire.after")  # in an attempt, at most
OF_A_PRODUCER = ("engine.capture", "features.put", "ledger.reserve", "ledger.commit", "ledger.lease")


class Violation(AssertionError):  # noqa: N818 (it is what the tests look for)
    """The run broke a promise."""


def _around(calls: tuple[str, ...]) -> list[str]:
    return [f"{call}.{side}" for call in calls for side in ("before", "after")]


POINTS: dict[int | str, list[str]] = {
    0: [
        *_around((*OF_A_LEARNER, *OF_RANK_0)),
        *("checkpoint.after_file", "checkpoint.before_rename", "checkpoint.before_sync"),
        *("ledger.before_commit", "ledger.after_commit", *ONCE),
    ],
    1: [*_around(OF_A_LEARNER), *ONCE[:2]],
    "producer-0": [*_around(OF_A_PRODUCER), "features.put.before_seal"],
    "producer-1": [*_around(OF_A_PRODUCER), "features.put.before_seal"],
}


SHARDED_POINTS: dict[int | str, list[str]] = {
    **POINTS,
    0: [
        *(point for point in POINTS[0] if "fingerprint" not in point),
        *("checkpoint.after_aside", "checkpoint.before_manifest"),
    ],
    1: [*(point for point in POINTS[1] if "fingerprint" not in point), *["checkpoint.after_file"] * 4],
}


def strikes_of(seed: int, *, sharded: bool = False) -> list[Strike]:
    """Two fifths of them hit rank 0, and as many rank 1."""
    rng, strikes = random.Random(seed), []
    points = SHARDED_POINTS if sharded else POINTS
    for _ in range(rng.randint(1, STRIKES_MAX)):
        victims: list[int | str] = [1, 1, 0, 0, rng.choice(["producer-0", "producer-1"])]
        victim = rng.choice(victims)
        stops = victim in (0, 1) and rng.random() < STOPPED
        number = signal.SIGSTOP if stops else signal.SIGKILL
        point = rng.choice(points[victim])
        strikes.append(Strike(victim, point, 1 if point in ONCE else rng.randint(1, 4), number))
    return strikes


class StruckRun:
    """Drives one run to its end; `counts` says what happened on the way."""

    def __init__(self, folder: Path, strikes: list[Strike], *, sharded: bool = False) -> None:
        self.folder = folder
        self._shape = {**SHAPE, "sharded": sharded}
        self.counts: Counter[str] = Counter()
        self._left = list(strikes)
        self._live: dict[int, int | str] = {}  # ranks and producers by process
        self._armed: dict[int, Strike] = {}
        self._gone: list[str] = []  # producers that have captured everything

    def drive(self) -> None:
        """Raises Violation."""
        deadline = time.monotonic() + DEADLINE_S
        while not (self.folder / "final.safetensors").exists():
            self._staff()
            while not self._hear():
                if time.monotonic() > deadline:
                    self._end()
                    raise Violation(f"the run did not end within {DEADLINE_S:g} s")
                time.sleep(0.02)
        self._end()

    def _staff(self) -> None:
        for number in range(PRODUCERS):
            role = f"producer-{number}"
            if role not in self._live.values() and role not in self._gone:
                self._start(role, partial(_produce, number))
        if not self._ranks():
            meeting = MeetingPoint(RANKS)
            for rank in range(RANKS):
                self._start(rank, partial(_train, meeting.environment(rank)))
            meeting.close()
            self.counts["attempts"] += 1

    def _start(self, name: int | str, work: partial[None]) -> None:
        strike = next((strike for strike in self._left if strike.victim == name), None)
        pid = forked(self.folder, work, strike, self._shape)
        self._live[pid] = name
        if strike is not None:
            self._armed[pid] = strike

    def _ranks(self) -> list[int]:
        return [pid for pid, name in self._live.items() if isinstance(name, int)]

    def _hear(self) -> bool:
        """Whether a process has ended, or the ranks have because of one that was stopped."""
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if pid == 0:
            return False
        if os.WIFSTOPPED(status):
            self._struck(pid)
            return False
        name, code = self._live.pop(pid), os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            self._struck(pid)
        elif code not in (0, RanksError.exit_code, FencedError.exit_code):
            told = " ".join(path.read_text() for path in self.folder.glob(f"*-{pid}.txt"))
            self._end()
            raise Violation(f"{name} ended with {code}: {told}")
        elif isinstance(name, str) and code == 0:
            self._gone.append(name)
        if isinstance(name, int) and code:
            self._end_ranks()
        return True

    def _struck(self, pid: int) -> None:
        strike = self._armed.pop(pid)
        self._left.remove(strike)
        who = f"rank {strike.victim}" if isinstance(strike.victim, int) else "a producer"
        self.counts[f"{who} {'stopped' if strike.number == signal.SIGSTOP else 'killed'}"] += 1

    def _end_ranks(self) -> None:
        """The others know by themselves; one that was stopped does not. Raises Violation."""
        began = time.monotonic()
        while left := self._ranks():
            pid, status = os.waitpid(left[0], os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                del self._live[pid]
                if code == -signal.SIGKILL and pid in self._armed:
                    self._struck(pid)
            elif _is_stopped(left[0]):
                self._kill(left[0])
            elif time.monotonic() - began > 4 * TIMEOUT_S:
                raise Violation(f"rank {self._live[left[0]]} did not end after another one had")
            else:
                time.sleep(0.01)

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del self._live[pid]
        if pid in self._armed and self._armed[pid].number == signal.SIGSTOP:
            self._struck(pid)  # the stop was not told before the end of the others

    def _end(self) -> None:
        for pid in list(self._live):
            if self.folder.joinpath("final.safetensors").exists():  # they end by themselves
                os.waitpid(pid, 0)
                del self._live[pid]
            else:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                del self._live[pid]


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _produce(number: int, run: SmallRun) -> None:
    open_store(run, owner=True, writer=number)
    run.place = {"worker": str(number), "timeout_s": 5.0}
    _, drive = run.producer()
    drive()


def _train(environment: dict[str, str], run: SmallRun) -> None:
    group, store = join(run, environment, TIMEOUT_S, captures=False)
    assert group is not None, "there are others"
    if group.rank:
        follow(run, group)
        return
    trainer, loader = run.consumer(group=group)
    trainer.fit(loader)
    trainer.ranks.end()
    finish(run, trainer, store)


def check(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Raises Violation."""
    ledger = SQLiteLedger(folder / "ledger.db")
    now = ledger.snapshot()
    finished = [s.sample_id for trained in ledger.history() for s in trained.samples if s.finished]
    ledger.close()
    report = fsck(folder, features=folder / "features", passes=SHAPE["passes"])
    left = {
        "weights that differ": not same_bits(load_file(folder / "final.safetensors"), wanted),
        "samples not trained once": sorted(finished) != sorted(f"small:{n}" for n in range(14)),
        "samples quarantined": now.quarantined,
        "features left": now.usage.resident_samples,
        "what the checker finds": report.errors or report.unchecked,
    }
    if wrong := {what: value for what, value in left.items() if value}:
        raise Violation(str(wrong))


def play(
    strikes: list[Strike], wanted: dict[str, torch.Tensor] | None, *, sharded: bool = False
) -> tuple[Counter[str], dict[str, torch.Tensor]]:
    """One run in a folder of its own, checked; what happened, and its weights. Raises Violation."""
    folder = Path(tempfile.mkdtemp(prefix="paceline-ranks-"))
    try:
        run = StruckRun(folder, strikes, sharded=sharded)
        run.drive()
        found = load_file(folder / "final.safetensors")
        check(folder, found if wanted is None else wanted)
    except Violation as violation:
        raise Violation(f"{violation}\nthe run is in {folder}, struck by {strikes}") from violation
    shutil.rmtree(folder)
    return run.counts, found


def execute_all(seeds: range, *, sharded: bool = False) -> Counter[str]:
    """Raises Violation, with the command that repeats it."""
    import_module("torch._dynamo")  # the optimizer would import it in every process
    gc.collect()
    gc.freeze()  # forks copy less
    _, wanted = play([], None, sharded=sharded)
    total: Counter[str] = Counter()
    for seed in seeds:
        try:
            total += play(strikes_of(seed, sharded=sharded), wanted, sharded=sharded)[0]
        except Violation as violation:
            again = f"python -m paceline.testing.rank_schedules --seed {seed}{' --sharded' * sharded}"
            raise Violation(f"{violation}\nrepeat: {again}") from violation
        total["schedules"] += 1
    return total


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--count", type=int, default=1)
    arguments.add_argument("--sharded", action="store_true")
    given = arguments.parse_args()
    counts = execute_all(range(given.seed, given.seed + given.count), sharded=given.sharded)
    sys.stdout.write(f"{json.dumps(dict(counts))}\n")


if __name__ == "__main__":
    main()
