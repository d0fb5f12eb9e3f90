"""Measuring beside training, in real processes: it changes no bit, whoever is killed, and may end it."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from paceline.config.load import load_run_config
from paceline.evaluation.curve import Point, beginning_of, read_curve, record_point
from paceline.ledger.locks import live_holder
from paceline.testing import random_kills
from paceline.testing.random_kills import make_run
from paceline.testing.tiny_run import Begun, TinyRun, wait_until


@pytest.fixture(scope="module")
def unmeasured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return make_run(tmp_path_factory.mktemp("plain"), tiny_model).train_here()


def measured_run(folder: Path, model: Path) -> TinyRun:
    run = make_run(folder, model)
    run.config["evaluation"]["every_steps"] = 3
    run.write()
    return run


def evaluator_of(train: Begun) -> int | None:
    """The process that measures beside training, as soon as there is one."""
    for children in Path(f"/proc/{train.pid}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            with suppress(OSError):
                if b"paceline.roles.evaluator" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
    return None


def awaited_evaluator(train: Begun) -> int:
    wait_until(lambda: evaluator_of(train) is not None, train)
    pid = evaluator_of(train)
    assert pid is not None
    with suppress(
        OSError
    ):  # as on a machine with a processor to spare; else a busy one keeps the test waiting
        os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, pid, 0)
        Path(f"/proc/{pid}/autogroup").write_text("0")
    return pid


def has_ended(pid: int) -> bool:
    try:
        return b"paceline" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def curve_steps(run: TinyRun) -> list[int]:
    ledger = run.ledger()
    points = read_curve(run.directory, ledger.facts()).points
    ledger.close()
    return [point.step for point in points]


def check(run: TinyRun, unmeasured: dict[str, torch.Tensor]) -> None:
    """The weights are those of the run that nobody measured or killed, and nothing is left behind."""
    random_kills.check(run, unmeasured)
    assert live_holder(run.directory, "evaluator") is None
    assert curve_steps(run)[-1] == 30, "the end is measured"
    assert len(list((run.directory / "checkpoints" / "best").iterdir())) == 1
    assert not list(run.directory.rglob("*.new"))
    assert not load_run_config(run.run_file).feature_folder.exists()


def test_an_evaluator_that_is_killed_costs_nothing(
    tiny_model: Path, tmp_path: Path, unmeasured: dict[str, torch.Tensor]
) -> None:
    """The run goes on meanwhile, says so, and measures a later checkpoint."""
    run = measured_run(tmp_path, tiny_model)
    with run.start("train") as train:
        os.kill(awaited_evaluator(train), signal.SIGKILL)
        out, err = train.communicate(timeout=500)
    assert train.returncode == 0, err
    assert "a measurement beside training failed (it ended by SIGKILL)" in out
    check(run, unmeasured)


def test_whoever_else_is_killed_during_a_measurement_the_weights_are_the_same(
    tiny_model: Path, tmp_path: Path, unmeasured: dict[str, torch.Tensor]
) -> None:
    """The trainer, and then the supervisor: the evaluator that it leaves behind ends."""
    run = measured_run(tmp_path, tiny_model)
    with run.start("train") as train:
        evaluator, trainer = awaited_evaluator(train), live_holder(run.directory, "consumer")
        assert trainer, "it is being measured beside training"
        os.kill(trainer, signal.SIGKILL)
        train.kill()
    while not has_ended(evaluator):
        time.sleep(0.005)
    again = run.command("train")
    assert again.returncode == 0, again.stderr
    check(run, unmeasured)


def flat_points(run: TinyRun) -> int:
    """As if the head and the step before it had been measured, with nothing gained; the head's step."""
    ledger = run.ledger()
    head, facts = ledger.snapshot().head, ledger.facts()
    ledger.close()
    assert head is not None
    way = {"prompts": 1, "num_draft_tokens": 3, "branching": 1, "acceptance_rate": [0.5]}
    way |= {"acceptance_length": 1.5, "emitted_per_cycle": 1.5}
    for step in (head.step - 1, head.step):
        names = (head.name, head.manifest_digest, "digest of a draft", "conditions")
        record_point(run.directory, Point(step, beginning_of(facts), *names, {**way, "chain": way}, 3))
    return head.step


def test_a_flat_curve_ends_training_early_and_the_run_can_go_on_later(
    tiny_model: Path, tmp_path: Path, unmeasured: dict[str, torch.Tensor]
) -> None:
    """A clean end: complete, measured, exported, nothing resident. Without the rule the run goes on, to the
    same weights as if it had never stopped."""
    run = measured_run(tmp_path, tiny_model)
    run.config["training"]["stop_when_flat"] = {"evaluations": 1, "gain": 0.1}
    run.config["export"] = {"formats": ["hf"]}
    run.write()
    with run.start("train") as train:
        awaited_evaluator(train)
        train.send_signal(signal.SIGINT)
        train.communicate(timeout=500)
    assert train.returncode == 130
    step = flat_points(run)
    assert step < 30
    stopped = run.command("train")
    assert stopped.returncode == 0, stopped.stderr
    assert "training stops early (training.stop_when_flat)" in stopped.stdout
    ledger = run.ledger()
    assert ledger.facts()["completed_step"] == step
    ledger.close()
    assert not load_run_config(run.run_file).feature_folder.exists()
    assert (run.directory / "export" / "hf").is_dir()
    assert "early stop" in run.command("status").stdout
    del run.config["training"]["stop_when_flat"]
    run.write()
    assert run.command("train").returncode == 0
    check(run, unmeasured)
