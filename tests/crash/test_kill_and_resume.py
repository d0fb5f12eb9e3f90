"""SIGKILL in the middle of a real run: real processes, a real (tiny) target, the command a user types.

The resumed run must end with weights bitwise equal to those of the run nobody touched.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from paceline.ledger.locks import live_holder
from paceline.testing import random_kills
from paceline.testing.random_kills import make_run
from paceline.testing.small_run import same_bits
from paceline.testing.tiny_run import TinyRun, wait_until
from paceline.testing.tracker_suite import scalars

NUM_SAMPLES = 120


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return make_run(tmp_path_factory.mktemp("plain"), tiny_model).train_here()


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def in_the_middle(run: TinyRun) -> Callable[[], bool]:
    """Some steps are trained and some groups are not captured yet, or at least not trained."""

    def look() -> bool:
        if not (run.directory / "ledger.db").exists():
            return False
        ledger = run.ledger()
        trained = ledger.snapshot().samples_trained
        ledger.close()
        return 8 <= trained < NUM_SAMPLES

    return look


def check(run: TinyRun, uninterrupted: dict[str, torch.Tensor]) -> None:
    now = run.ledger().snapshot()
    assert same_bits(run.final_weights(), uninterrupted)
    assert now.samples_trained == now.committed == NUM_SAMPLES
    assert now.usage.resident_samples == now.usage.provisional_samples == 0


@pytest.mark.parametrize("role", ["consumer", "producer"])
def test_a_killed_role_is_started_again_and_the_weights_are_the_same(
    tiny_model: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor], role: str
) -> None:
    """The supervisor notices the death, starts the role again, and says so in the last line."""
    run = make_run(tmp_path, tiny_model)
    with run.start("train") as train:
        wait_until(in_the_middle(run), train)
        wait_until(lambda: bool(live_holder(run.directory, role)), train)
        kill(live_holder(run.directory, role))
        out, err = train.communicate(timeout=500)
    assert train.returncode == 0, err
    assert out.strip().endswith(f"{NUM_SAMPLES} samples trained | 1 restarts")
    check(run, uninterrupted)


def test_everything_killed_at_once_goes_on_with_the_same_command(
    tiny_model: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Supervisor, producer and consumer die together, as in a host crash; nothing is cleaned up."""
    run = make_run(tmp_path, tiny_model)
    with run.start("train") as train:
        wait_until(in_the_middle(run), train)
        os.kill(train.pid, signal.SIGSTOP)  # so that it cannot start a role again
        for role in ("producer", "consumer"):
            if pid := live_holder(run.directory, role):
                kill(pid)
        kill(train.pid)
    result = run.command("train")
    assert result.returncode == 0, result.stderr
    check(run, uninterrupted)


def test_a_run_that_is_stopped_ends_at_a_checkpoint_and_goes_on(
    tiny_model: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Both roles end at a safe point, nothing provisional is left, the command resumes; its tracker, too."""
    run = make_run(tmp_path, tiny_model)
    run.config["tracking"] = {"to": ["tensorboard"]}
    run.write()
    with run.start("train") as train:
        wait_until(in_the_middle(run), train)
        stopped = run.command("stop")
        out, err = train.communicate(timeout=500)
    assert stopped.returncode == 0, stopped.stderr
    assert f"with a checkpoint at step {run.ledger().snapshot().trained_step}.\n" in stopped.stdout
    assert train.returncode == 130, out + err
    assert "nothing is lost" in out
    assert live_holder(run.directory, "consumer") is None
    assert live_holder(run.directory, "producer") is None
    assert run.ledger().snapshot().usage.provisional_samples == 0
    result = run.command("train")
    assert result.returncode == 0, result.stderr
    check(run, uninterrupted)
    [there] = (run.directory / "tensorboard").iterdir()
    losses = [step for tag, step in scalars(there) if tag == "train/loss"]
    assert losses == list(range(1, run.ledger().snapshot().trained_step + 1))


def test_kills_at_random_times_leave_the_same_weights(
    tiny_model: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Producer, consumer, supervisor or all of them, wherever they are: the command is started again.

    `make reliability` starts them from nothing, so that kills strike imports, too.
    """
    run = make_run(tmp_path, tiny_model)
    counts = random_kills.train_with_kills(run, random.Random(1), kills=3, longest_pause_s=1.5)
    assert any(what.endswith("killed") for what in +counts), "the first pause is shorter than any run"
    random_kills.check(run, uninterrupted)
