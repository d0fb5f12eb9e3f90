"""A run whose features lie at a real Mooncake master: who is killed does not show in the weights.

`make test-mooncake` runs it, in a network namespace of its own; the fast suite does not.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from paceline.ledger.locks import live_holder
from paceline.roles.workers import is_producer, known_roles
from paceline.telemetry import read_events
from paceline.testing import random_kills
from paceline.testing.mooncake_master import MooncakeMaster, is_alone
from paceline.testing.random_kills import make_run
from paceline.testing.tiny_run import Begun, TinyRun, wait_until

pytestmark = pytest.mark.timeout(1200)  # starts of Python with torch, on a machine that may be busy


@pytest.fixture
def master(tmp_path: Path) -> Iterator[MooncakeMaster]:
    assert is_alone(), "Mooncake's clients listen on all addresses: run this by `make test-mooncake`"
    found = MooncakeMaster(tmp_path / "master")
    yield found
    found.kill()


@pytest.fixture(scope="module")
def wanted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run with one producer on shared memory."""
    return make_run(tmp_path_factory.mktemp("plain"), tiny_model).train_here()


def made(folder: Path, model: Path, master: MooncakeMaster) -> TinyRun:
    run = make_run(folder, model, producers=2, producer_timeout_s=5)
    # Room for a third of the samples, so that nobody captures the whole run before anybody is killed.
    run.config["features"] |= {"store": "mooncake", "master": master.address, "budget_samples": 40}
    run.write()
    return run


def told(run: TinyRun, kind: str) -> int:
    """How many events of this kind all roles have written."""
    files = (run.directory / "events").glob("*.jsonl")
    return sum(event["event"] == kind for path in files for event in read_events(path))


def killed_producer(run: TinyRun, train: Begun) -> None:
    wait_until(lambda: bool(live_holder(run.directory, "producer")), train)
    pid = live_holder(run.directory, "producer")
    assert pid
    os.kill(pid, signal.SIGKILL)


def ended(run: TinyRun, train: Begun) -> str:
    out, err = train.communicate(timeout=900)
    assert train.returncode == 0, out[-3000:] + err[-3000:]
    return out


def test_the_master_and_a_producer_are_killed_in_a_run(
    tiny_model: Path,
    tmp_path: Path,
    master: MooncakeMaster,
    wanted: dict[str, torch.Tensor],
    kills: Counter[str],
) -> None:
    """The restarted master knows no object, and the producer's objects die with it: they come again."""
    run = made(tmp_path / "run", tiny_model, master)
    with run.start("train") as train:
        wait_until(lambda: told(run, "step") > 2, train)
        master.kill()
        before = told(run, "group")
        master.start()
        wait_until(lambda: told(run, "group") > before, train)
        killed_producer(run, train)
        ended(run, train)
    random_kills.check(run, wanted)
    assert told(run, "waiting_for_recapture") > 0, "samples were lost, or the kills came too late"
    kills.update(["master", "producer"])
    assert "at the Mooncake master" in " ".join(run.command("status").stdout.split())


@pytest.mark.parametrize("seed", [1, 2])
def test_anybody_is_killed_at_random_times(
    seed: int,
    tiny_model: Path,
    tmp_path: Path,
    master: MooncakeMaster,
    wanted: dict[str, torch.Tensor],
    kills: Counter[str],
) -> None:
    """The master among them, which comes back a little later."""
    run, rng, counts = made(tmp_path / "run", tiny_model, master), random.Random(seed), Counter[str]()
    left = 5
    while True:
        with run.start("train") as train:
            while True:
                try:
                    out, err = train.communicate(timeout=rng.uniform(1.0, 12.0) if left else 900)
                    break
                except subprocess.TimeoutExpired:
                    victim = rng.choice(["master", "master", "producer", "consumer", "everything"])
                    struck = strike(run, train, master, victim, rng)
                    left -= struck
                    counts[victim] += struck
        if train.returncode == 0:
            break
        assert train.returncode == -signal.SIGKILL, f"{counts}: {out[-3000:]}{err[-3000:]}"
    random_kills.check(run, wanted)
    kills.update(counts)


def strike(run: TinyRun, train: Begun, master: MooncakeMaster, victim: str, rng: random.Random) -> bool:
    """Whether it was there to be killed."""
    if victim == "master":
        master.kill()
        with suppress(subprocess.TimeoutExpired):  # what it still had may have been all that it needed
            train.wait(timeout=rng.uniform(0.0, 6.0))
        master.start()
        return True
    producers = [role for role in known_roles(run.directory) if is_producer(role)]
    roles = {"producer": producers[-1:], "consumer": ["consumer"], "everything": [*producers, "consumer"]}
    pids = [pid for role in roles[victim] if (pid := live_holder(run.directory, role))]
    if victim == "everything":
        train.send_signal(signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    if victim == "everything":
        train.kill()
    return bool(pids) or victim == "everything"
