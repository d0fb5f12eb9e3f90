"""Several producers of a real run: they come, die and leave; the weights are those of one producer's run."""

from __future__ import annotations

import fcntl
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from paceline.config.load import load_run_config
from paceline.ledger.facts import producers_in
from paceline.ledger.locks import live_holder
from paceline.telemetry import read_events
from paceline.testing import random_kills
from paceline.testing.random_kills import make_run
from paceline.testing.tiny_run import Begun, TinyRun, wait_until


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return make_run(tmp_path_factory.mktemp("plain"), tiny_model).train_here()


def told(run: TinyRun, role: str, kind: str) -> int:
    """How many events of this kind the role has written."""
    return sum(event["event"] == kind for event in read_events(run.directory / "events" / f"{role}.jsonl"))


def test_three_producers_that_die_at_random_times_leave_the_same_weights(
    tiny_model: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Each is started again by itself; the others go on meanwhile. Which of them captures is not fixed."""
    run = make_run(tmp_path, tiny_model, producers=3, producer_timeout_s=5)
    counts = random_kills.train_with_kills(run, random.Random(5), kills=3, longest_pause_s=1.5)
    assert any(what.endswith("killed") for what in +counts), "the first pause is shorter than any run"
    random_kills.check(run, uninterrupted)


def test_producers_are_held_up_and_join_and_are_killed_and_leave(
    tiny_model: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """The first producer is stopped with a group that all wait for; one that joins takes it, and is killed.

    Another one joins, and is asked to leave. Then the first one goes on: its late work is refused, and it is
    started again. There is room for two groups at a time, so nobody captures the whole run meanwhile.
    """
    run = make_run(tmp_path, tiny_model, producer_timeout_s=2)
    run.config["features"]["budget_samples"] = 40
    run.write()
    with run.start("train") as train:
        wait_until(lambda: told(run, "producer", "group") > 0, train)
        held_up = stop_with_a_group(run, train)
        with run.start("produce", "--join") as first:
            wait_until(lambda: told(run, "producer-1", "taken_over") > 0, train)
            captured = told(run, "producer-1", "group")
            wait_until(lambda: told(run, "producer-1", "group") > captured, train)
            first.kill()
        with run.start("produce", "--join") as second:
            captured = told(run, "producer-1", "group")
            wait_until(lambda: told(run, "producer-1", "group") > captured, train)
            second.terminate()
            assert second.wait(timeout=500) == 0
        os.kill(held_up, signal.SIGCONT)
        out, err = train.communicate(timeout=500)
    assert train.returncode == 0, err
    assert "120 samples trained" in out
    random_kills.check(run, uninterrupted)
    assert producers_in(run.ledger().facts()) == {}, "everybody has left, or was given up"


def stop_with_a_group(run: TinyRun, process: Begun) -> int:
    """Stop the producer while it holds a group, and nothing that would delay others until it goes on."""
    features = load_run_config(run.run_file).feature_folder
    locks = ["ledger.db-gate", "answers/turns.lock", features / "writer.lock"]
    while True:
        wait_until(lambda: bool(live_holder(run.directory, "producer")), process)
        pid = live_holder(run.directory, "producer")
        assert pid
        os.kill(pid, signal.SIGSTOP)
        if all(is_free(run.directory / lock) for lock in locks) and holds_a_group(run):
            return pid
        os.kill(pid, signal.SIGCONT)


def holds_a_group(run: TinyRun) -> bool:
    ledger = run.ledger()
    leased = ledger.snapshot().prompts.leased
    ledger.close()
    return leased > 0


def is_free(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
