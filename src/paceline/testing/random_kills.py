"""The real command on a tiny real target, with its processes killed at random times until it has finished.

    python -m paceline.testing.random_kills --seed 3 [--kills 6] [--ranks 2]

The kills strike anywhere: in imports, while a model loads, in the middle of a system call. The seed fixes
which process dies after how long, not what it is doing then. The run must end in the weights of the
undisturbed run, and the checker must find it sound.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from paceline.ledger.locks import live_holder
from paceline.roles.trainers import known_ranks
from paceline.roles.workers import is_producer, known_roles
from paceline.testing.small_run import same_bits
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import Begun, TinyRun

VICTIMS = ("producer", "consumer", "supervisor", "everything")
PAUSE_S = (0.1, 10.0)  # between two kills
PROMPTS, ROUNDS = 20, 6


class Violation(AssertionError):  # noqa: N818 (it is what the tests look for)
    """The run broke a promise."""


def make_run(folder: Path, model: Path, **machine: float) -> TinyRun:
    """Long enough to be killed a few times: 120 samples, 30 steps; with state and choices beside weights, and
    states in float8."""
    prompts = {"path": str(folder / "train.jsonl"), "rounds": ROUNDS, "max_answer_tokens": 12}
    more: dict[str, Any] = {
        "training": {"ema_decay": 0.9},
        "method": {"feature_noise": 0.05, "transfer": "float8"},
    }
    return TinyRun(folder, model, prompts=prompts, machine=machine, **more)


def train_with_kills(
    run: TinyRun, rng: random.Random, kills: int, longest_pause_s: float = PAUSE_S[1]
) -> Counter[str]:
    """`paceline train`, started again whenever it was killed itself, to its end; how often who was killed."""
    counts: Counter[str] = Counter()
    while True:
        counts["starts"] += 1
        with run.start("train") as train:
            while True:
                pause = rng.uniform(PAUSE_S[0], longest_pause_s) if kills else None
                try:
                    out, err = train.communicate(timeout=pause)
                    break
                except subprocess.TimeoutExpired:
                    victim = rng.choice(VICTIMS)
                    struck = _strike(run, train, victim, rng)
                    kills -= struck  # on a slow machine the victim may not have started yet
                    counts[f"{victim} killed"] += struck
        if train.returncode == 0:
            return counts
        if train.returncode != -signal.SIGKILL:
            raise Violation(f"paceline train ended with {train.returncode}: {out[-2000:]}\n{err[-2000:]}")


def _strike(run: TinyRun, train: Begun, victim: str, rng: random.Random) -> bool:
    """Whether it was there to be killed."""
    producers = [role for role in known_roles(run.directory) if is_producer(role)]
    ranks = ["consumer", *known_ranks(run.directory)]
    if victim == "consumer":
        return _kill(live_holder(run.directory, ranks[rng.randrange(len(ranks)) if ranks[1:] else 0]))
    if victim == "producer":  # one of several
        return _kill(live_holder(run.directory, rng.choice(producers)))
    if victim == "everything":
        train.send_signal(signal.SIGSTOP)  # so that it cannot start a role again
        for role in (*producers, *ranks):
            _kill(live_holder(run.directory, role))
    train.kill()
    return True


def _kill(pid: int | None) -> bool:
    with suppress(ProcessLookupError):
        if pid:
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def check(run: TinyRun, wanted: dict[str, torch.Tensor]) -> None:
    """Raises Violation."""
    ledger = run.ledger()
    now = ledger.snapshot()
    finished = {s.sample_id for t in ledger.history() for s in t.samples if s.finished}
    left = {
        "weights that differ": not same_bits(run.final_weights(), wanted),
        "samples not trained": PROMPTS * ROUNDS - len(finished),
        "samples quarantined": now.quarantined,
        "prompts failed": ledger.failed(),
        "features left": now.usage.resident_samples,
    }
    ledger.close()
    fsck = run.command("fsck")
    left["what the checker finds"] = fsck.stdout if fsck.returncode else ""
    wrong = {what: value for what, value in left.items() if value}
    if wrong:
        raise Violation(f"after the run in {run.folder}: {wrong}")


def undisturbed(folder: Path, model: Path, ranks: int = 1) -> dict[str, torch.Tensor]:
    run = make_run(folder, model, trainers=ranks)
    train_with_kills(run, random.Random(0), kills=0)
    return run.final_weights()


def execute(
    seed: int, kills: int, model: Path, wanted: dict[str, torch.Tensor], ranks: int = 1
) -> Counter[str]:
    """One run in a folder of its own; of every second seed with three producers, with several ranks two.

    Raises Violation, with the command that repeats it.
    """
    folder = Path(tempfile.mkdtemp(prefix="paceline-killed-"))
    producers = 2 if ranks > 1 else 3 if seed % 2 else 1
    run = make_run(folder, model, producers=producers, producer_timeout_s=5, trainers=ranks)
    try:
        counts = train_with_kills(run, random.Random(seed), kills)
        check(run, wanted)
    except Violation as violation:
        command = f"python -m {__spec__.name} --seed {seed} --kills {kills} --ranks {ranks}"
        raise Violation(f"{violation}\nthe run is in {folder}\nrepeat: {command}") from violation
    shutil.rmtree(folder)
    return counts


def execute_all(seeds: range, kills: int, ranks: int = 1) -> Counter[str]:
    """One run a seed, against one of as many ranks that nothing happened to. Raises Violation."""
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        model = make_tiny_folder(Path(name) / "model")
        wanted = undisturbed(Path(name) / "undisturbed", model, ranks)
        for seed in seeds:
            total += execute(seed, kills, model, wanted, ranks)
    total["runs"] = len(seeds)
    return total


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--kills", type=int, default=6)
    arguments.add_argument("--ranks", type=int, default=1)
    given = arguments.parse_args()
    counts = execute_all(range(given.seed, given.seed + 1), given.kills, given.ranks)
    sys.stdout.write(f"{dict(counts)}\n")


if __name__ == "__main__":
    main()
