"""`paceline train` with two trainers: a calm run, and a sharded one of which a rank hangs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from paceline.ledger.locks import live_holder
from paceline.telemetry import read_events
from paceline.testing import random_kills
from paceline.testing.random_kills import make_run
from paceline.testing.tiny_run import TinyRun, wait_until

CLOSE = 1e-5  # of a tensor's norm: how far another order of sums may lead in a whole run


def steps(run: TinyRun) -> int:
    """How many its consumers have told of, as far as they are kept."""
    events = read_events(run.directory / "events" / "consumer.jsonl")
    return sum(event["event"] == "step" for event in events)


@pytest.mark.timeout(600)  # a quarter of a minute of processor time, and the machine may be busy
def test_a_rank_that_hangs_is_killed_and_all_ranks_are_started_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    """By the supervisor, once the others have waited for the time-out. The weights are those of a calm run
    that is not sharded, up to the order of sums."""
    plain = make_run(tmp_path / "plain", tiny_model, trainers=2)
    assert plain.command("train").returncode == 0
    run = make_run(tmp_path / "struck", tiny_model, trainers=2, shard=True, trainer_timeout_s=8)
    with run.start("train") as train:
        wait_until(lambda: steps(run) > 3, train)
        hangs = live_holder(run.directory, "consumer-1")
        assert hangs
        os.kill(hangs, signal.SIGSTOP)
        out, err = train.communicate(timeout=500)
    assert train.returncode == 0, err
    assert "120 samples trained" in out
    found, wanted = run.final_weights(), plain.final_weights()
    random_kills.check(run, found)
    for name, tensor in wanted.items():
        assert (found[name].double() - tensor.double()).norm() <= CLOSE * tensor.double().norm(), name
    told = read_events(run.directory / "events" / "consumer.jsonl")
    assert any("machine.trainer_timeout_s" in event.get("message", "") for event in told)
    assert "2 sharded from step 1 on" in run.command("status").stdout
