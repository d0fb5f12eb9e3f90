"""What a tracker gets of a run: every durable step once, whatever happened to the run and to the tracker."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.cli import track as tracking_command
from paceline.cli.main import app
from paceline.errors import PacelineError, RunBusyError
from paceline.ledger.facts import COMPLETED_STEP, LEDGER
from paceline.monitoring.looking import Look, RunLooks
from paceline.monitoring.status import read_status
from paceline.monitoring.tracking import Tracking, track
from paceline.roles.process import SUPERVISOR_VARIABLE
from paceline.telemetry import EventLog
from paceline.testing.run_by_hand import RunByHand
from paceline.trackers.tracker import Point, TrackedRun


class Remembering:
    """A tracker of any number of runs; `broken` makes its calls fail."""

    def __init__(self, *, tells: bool = True) -> None:
        self.held: dict[str, list[Point]] = {}
        self.broken = False
        self.opened: list[TrackedRun] = []
        self._tells = tells

    def open(self, run: TrackedRun) -> Remembering:
        self.opened.append(run)
        self.held.setdefault(run.key, [])
        return self

    @property
    def points(self) -> list[Point]:
        return self.held[self.opened[-1].key]

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.points]

    def newest(self) -> Mapping[str, int]:
        return {point.series: point.step for point in self.points} if self._tells else {}

    def write(self, points: Sequence[Point]) -> None:
        if self.broken:
            raise PacelineError("no connection")
        self.points.extend(points)

    def close(self) -> None:
        """Nothing is left."""


class Run:
    """A run by hand that tells its steps, as the consumer does."""

    def __init__(self, folder: Path) -> None:
        self.by_hand = RunByHand(folder)
        self.by_hand.ledger.set_facts(None, {LEDGER: {"identity": "a" * 32, "replaces": []}})
        self.folder = folder
        self.log = EventLog(folder / "events" / "consumer.jsonl")

    def train(self, loss: float) -> None:
        self.by_hand.train(self.by_hand.capture(1))
        self.tell(self.by_hand.ledger.snapshot().trained_step, loss)

    def tell(self, step: int, loss: float) -> None:
        self.log.write("step", step=step, loss=loss, samples=1, blocked_seconds=3.0)

    def close(self) -> None:
        self.log.close()
        self.by_hand.ledger.close()


@pytest.fixture
def run(tmp_path: Path) -> Any:
    run = Run(tmp_path / "run")
    yield run
    run.close()


def sent(tracking: Tracking, run: Run) -> int:
    return tracking.send(read_status(run.folder))


def test_a_step_appears_when_a_checkpoint_covers_it(run: Run) -> None:
    """Once, with its figures. What it was before a crash nobody saw."""
    there = Remembering()
    tracking = Tracking("there", there.open, "paceline")
    run.train(9.0)
    assert sent(tracking, run) == 0
    run.tell(1, 2.0)  # trained again
    run.by_hand.checkpoint()
    run.train(1.0)
    assert sent(tracking, run) == 1
    assert sent(tracking, run) == 0
    assert [(p.series, p.step, dict(p.figures)) for p in there.points] == [
        ("train", 1, {"loss": 2.0, "samples": 1})
    ]
    run.by_hand.checkpoint()
    assert sent(tracking, run) == 1
    tracking.close()


def test_steps_that_are_trained_again_after_a_fall_back_come_once(run: Run) -> None:
    """A damaged checkpoint rolls back what a tracker has seen already."""
    there = Remembering()
    tracking = Tracking("there", there.open, "paceline")
    for loss in (3.0, 2.0):
        run.train(loss)
        run.by_hand.checkpoint()
    assert sent(tracking, run) == 2
    run.tell(2, 2.0)
    run.train(1.0)
    run.by_hand.checkpoint()
    assert sent(tracking, run) == 1
    assert there.steps == [1, 2, 3]
    tracking.close()


@pytest.mark.parametrize("tells", [True, False], ids=["it knows", "the record knows"])
def test_another_process_goes_on_after_the_last_point(run: Run, tells: bool) -> None:
    """Under the same id, by what the tracker tells or by the record in the run's folder."""
    there = Remembering(tells=tells)
    for loss in (3.0, 2.0, 1.0):
        tracking = Tracking("there", there.open, "paceline")
        run.train(loss)
        run.by_hand.checkpoint()
        assert sent(tracking, run) == 1
        tracking.close()
    assert there.steps == [1, 2, 3]
    assert len({opened.key for opened in there.opened}) == 1


def test_a_tracker_that_was_away_gets_everything_later(run: Run) -> None:
    """No point is lost with a call that fails, and none comes twice."""
    there = Remembering()
    tracking = Tracking("there", there.open, "paceline")
    run.train(3.0)
    run.by_hand.checkpoint()
    sent(tracking, run)
    there.broken = True
    run.train(2.0)
    run.by_hand.checkpoint()
    for _ in range(2):
        with pytest.raises(PacelineError, match="no connection"):
            sent(tracking, run)
    there.broken = False
    assert sent(tracking, run) == 1
    assert there.steps == [1, 2]
    tracking.close()


def test_a_run_that_begins_anew_in_the_same_folder_is_another_run(run: Run) -> None:
    """A new ledger, a new identity; the record of the old one does not count."""
    there = Remembering(tells=False)
    tracking = Tracking("there", there.open, "paceline")
    for loss in (3.0, 2.0):
        run.train(loss)
    run.by_hand.checkpoint()
    assert sent(tracking, run) == 2
    run.by_hand.ledger.set_facts(None, {LEDGER: {"identity": "b" * 32, "replaces": []}})
    assert sent(tracking, run) == 2
    assert len(there.held) == 2
    tracking.close()


def test_events_that_were_cut_short_bring_no_step_twice(run: Run) -> None:
    """A long file of events is cut to its tail in place, and may have grown beyond its old size since."""
    there = Remembering()
    tracking = Tracking("there", there.open, "paceline")
    for loss in (3.0, 2.0):
        run.train(loss)
        run.by_hand.checkpoint()
    sent(tracking, run)
    path = run.folder / "events" / "consumer.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[-1])
    run.train(1.0)
    run.by_hand.checkpoint()
    run.log.write("note", message="x" * 500)
    assert sent(tracking, run) == 1
    assert there.steps == [1, 2, 3]
    tracking.close()


def test_nothing_that_names_a_place_is_sent(run: Run) -> None:
    """Paths and addresses stay here."""
    recorded = {"run.directory": "/home/me", "ledger.url": "redis://x", "training.batch_size": 4}
    recorded |= {"method.start_from": "my-draft", "method.of_another_package": "/home/me"}
    run.by_hand.ledger.set_facts(None, {"config": recorded})
    there = Remembering()
    tracking = Tracking("there", there.open, "paceline")
    sent(tracking, run)
    assert dict(there.opened[-1].settings) == {"training.batch_size": 4}
    tracking.close()


def test_one_process_at_a_time_sends_to_a_tracker(run: Run) -> None:
    """Two would send every point twice."""
    there = Remembering()
    first, second = (Tracking("there", there.open, "paceline") for _ in range(2))
    sent(first, run)
    with pytest.raises(RunBusyError):
        sent(second, run)
    first.close()
    assert sent(second, run) == 0
    second.close()


def test_a_tracker_that_fails_holds_no_other_up(run: Run) -> None:
    """It is told of once, and its error is the command's at the end."""
    bad, good, told = Remembering(), Remembering(), []
    bad.broken = True
    run.train(1.0)
    run.by_hand.checkpoint()
    looks = iter([False, False, True])
    trackings = [Tracking("bad", bad.open, "p"), Tracking("good", good.open, "p")]
    with pytest.raises(PacelineError, match="no connection"):
        track(
            trackings, lambda: Look(read_status(run.folder), is_over=next(looks)), lambda: False, told.append
        )
    assert good.steps == [1]
    assert told == ["no connection It is tried again."]
    for one in trackings:
        one.close()


def test_who_is_asked_to_end_sends_what_the_last_checkpoint_covered(run: Run) -> None:
    """`paceline stop` has the consumer write one."""
    there = Remembering()

    def wait() -> bool:
        run.train(1.0)
        run.by_hand.checkpoint()
        return True

    tracking = Tracking("there", there.open, "p")
    track([tracking], lambda: Look(read_status(run.folder)), wait, lambda _: None)
    assert there.steps == [1]
    tracking.close()


def test_the_command_sends_a_finished_run_to_tensorboard(run: Run) -> None:
    """And says which trackers there are if it knows none of that name."""
    run.train(1.0)
    run.by_hand.checkpoint()
    run.by_hand.ledger.set_facts(None, {COMPLETED_STEP: 1})
    result = CliRunner().invoke(app, ["track", str(run.folder), "--to", "tensorboard", "--project", "p"])
    assert result.exit_code == 0, result.output
    record = json.loads((run.folder / "trackers" / "tensorboard.json").read_text())
    assert record["newest"] == {"train": 1}
    unknown = CliRunner().invoke(app, ["track", str(run.folder), "--to", "tensorbord", "--project", "p"])
    assert unknown.exit_code == 2
    assert "tensorboard, wandb, mlflow, trackio" in unknown.output


def test_a_tracker_that_train_started_ends_with_train(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete run that is about to go on, with more data, is not over."""
    run.by_hand.ledger.set_facts(None, {COMPLETED_STEP: 0})
    monkeypatch.setenv(SUPERVISOR_VARIABLE, str(os.getppid()))
    assert not tracking_command._look(RunLooks(lambda: run.folder)).is_over
    monkeypatch.setenv(SUPERVISOR_VARIABLE, "1000000000")  # it is gone
    assert tracking_command._look(RunLooks(lambda: run.folder)).is_over
