"""Checkpoints that are written while training goes on: what is committed, when, and what is not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from paceline import crashpoints
from paceline.errors import CheckpointError
from paceline.fsck.checker import check
from paceline.testing.light_run import (
    LightRun,
    RunShape,
    build_consumer,
    expected_steps,
    head_of,
    uninterrupted,
)
from paceline.training import checkpoint_writer

SHAPE = RunShape(prompts=18, group=3, batch=3, passes=1, interval=2)
WAIT_S = 60.0


class HeldUp:
    """Holds up whoever writes a checkpoint of a later step than 0 until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.waits = threading.Event()
        self._first = True

    def __call__(self, point: str) -> None:
        if point == "checkpoint.before_rename":
            if not self._first:
                self.waits.set()
                assert self.go.wait(WAIT_S)
            self._first = False


def test_the_other_ranks_are_told_that_rank_0_lives_while_a_disk_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would take it for lost; the time between two beats is that of a wait for samples."""
    monkeypatch.setattr(checkpoint_writer, "WAIT_S", 0.0)
    run, held, beats = LightRun(tmp_path / "run", SHAPE), HeldUp(), list[int]()
    run.produce()
    ledger, features = run.open_ledger(), run.open_features(owner=False)

    def beat() -> None:
        beats.append(1)
        if len(beats) == 3:
            held.go.set()

    crashpoints.watch(held)
    try:
        with ThreadPoolExecutor(2) as executor:
            trainer, loader = build_consumer(SHAPE, ledger, features, run.checkpoints, executor=executor)
            trainer.coordinator._writer.while_waiting = beat
            trainer.fit(loader)
    finally:
        held.go.set()
        crashpoints.watch(None)
    assert len(beats) >= 3


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """Steps are acked meanwhile; nothing is head or freed before the folder is durable."""
    run, held = LightRun(tmp_path / "run", SHAPE), HeldUp()
    run.produce()
    ledger, features = run.open_ledger(), run.open_features(owner=False)
    heads_at: dict[int, int] = {}

    def report(event: str, **fields: Any) -> None:
        if event == "step":
            heads_at[fields["step"]] = ledger.snapshot().checkpoints[-1].step
            if fields["step"] == 3:
                assert held.waits.wait(WAIT_S)
                assert features.usage().resident_samples == SHAPE.prompts
                held.go.set()

    crashpoints.watch(held)
    try:
        with ThreadPoolExecutor(1) as executor:
            trainer, loader = build_consumer(
                SHAPE, ledger, features, run.checkpoints, executor=executor, report=report
            )
            assert trainer.fit(loader) == 6
    finally:
        crashpoints.watch(None)
    assert heads_at[3] == 0, "step 2 was being written when step 3 was acked"
    assert head_of(ledger, run.checkpoints) == uninterrupted(SHAPE, tmp_path / "undisturbed")
    assert features.usage().resident_samples == 0
    ledger.close()
    assert not check(run.folder).errors


def test_a_checkpoint_that_could_not_be_written_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the writing thread is the trainer's, and the run goes on from the head before."""
    run = LightRun(tmp_path / "run", RunShape(**{**vars(SHAPE), "threads": True}))
    run.produce()
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if "step-00000004" in self.name and self.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(CheckpointError, match="free space"):
        run.consume()
    ledger = run.open_ledger()
    assert ledger.snapshot().checkpoints[-1].step == 2
    monkeypatch.undo()
    run.consume()
    assert head_of(ledger, run.checkpoints) == uninterrupted(SHAPE, tmp_path / "undisturbed")
    ledger.close()


def test_a_checkpoint_nobody_lived_to_record_is_adopted(tmp_path: Path) -> None:
    """Written whole while later steps trained: the next consumer goes on from it."""
    run = LightRun(tmp_path / "run", SHAPE)
    run.produce()
    crashpoints.watch(raise_at("ledger.head.before", turn=2))
    with pytest.raises(InterruptedError):
        run.consume()
    crashpoints.watch(None)
    events: list[tuple[str, Any]] = []
    run.consume(lambda event, **fields: events.append((event, fields.get("step"))))
    assert ("rolled_forward", 2) in events
    ledger = run.open_ledger()
    assert head_of(ledger, run.checkpoints) == uninterrupted(SHAPE, tmp_path / "undisturbed")
    ledger.close()


def raise_at(point: str, turn: int) -> Any:
    left = [turn]

    def watch(name: str) -> None:
        if name == point:
            left[0] -= 1
            if left[0] == 0:
                raise InterruptedError

    return watch


@pytest.mark.parametrize(("group", "batch"), [(2, 4), (2, 3), (3, 4), (4, 4)])
def test_every_visit_is_trained_also_two_of_one_sample_in_one_step(
    tmp_path: Path, group: int, batch: int
) -> None:
    """A sample's passes may meet in a step; the steps are those that passes.py says, visit for visit."""
    shape = RunShape(prompts=7, group=group, batch=batch, passes=2)
    assert uninterrupted(shape, tmp_path).trained == expected_steps(shape)
