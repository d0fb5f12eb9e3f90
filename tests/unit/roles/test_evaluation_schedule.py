"""When a draft is measured beside training, what the user is told, and when training is to stop early."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.evaluation.curve import Curve, Point, record_point
from paceline.ledger.records import CheckpointRecord
from paceline.roles.child import RoleFailedError
from paceline.roles.evaluation_schedule import EvaluationSchedule, marks_left_out
from paceline.training.settings import FlatSection


def head(step: int, epoch: int = 1) -> CheckpointRecord:
    return CheckpointRecord(step, f"step-{step:08d}-{epoch:06d}-abc", "m" * 64)


def point(step: int, length: float = 1.5, left_out: tuple[int, ...] = ()) -> Point:
    way = {
        "prompts": 3,
        "num_draft_tokens": 3,
        "branching": 1,
        "acceptance_length": length,
        "emitted_per_cycle": length,
        "acceptance_rate": [0.5],
    }
    report = {**way, "chain": way}
    return Point(step, "today", head(step).name, "m" * 64, "d" * 64, "c", report, 100, left_out)


class Scheduled:
    """A schedule of every 100 steps over a run in `folder`, and what it told."""

    def __init__(
        self, folder: Path, *, every: int = 100, stop: FlatSection | None = None, **more: Any
    ) -> None:
        self.told: list[str] = []
        self.facts: dict[str, Any] = {"rendering_date": "today"}
        config: Any = SimpleNamespace(
            run=SimpleNamespace(directory=folder),
            evaluation=SimpleNamespace(every_steps=every),
            training=SimpleNamespace(stop_when_flat=stop),
        )
        self.folder = folder
        self.schedule = EvaluationSchedule(config, lambda: self.facts, self.told.append, **more)

    def is_due(self, step: int, epoch: int = 1) -> bool:
        return self.schedule.is_due(head(step, epoch))

    def measured(self, step: int, length: float = 1.5, left_out: tuple[int, ...] = ()) -> str:
        """As if the evaluator had begun with this checkpoint and ended well."""
        self.schedule.begun(head(step))
        record_point(self.folder, point(step, length, left_out))
        return self.schedule.ended(0, None)


def test_the_first_checkpoint_of_every_stretch_is_due(tmp_path: Path) -> None:
    """A checkpoint need not lie at the very step."""
    run = Scheduled(tmp_path)
    assert not run.schedule.is_due(None)
    assert not run.is_due(0)
    assert not run.is_due(75)
    assert run.is_due(125)
    run.measured(125)
    assert not run.is_due(150)
    assert not run.is_due(199)
    assert run.is_due(200)


def test_what_an_earlier_start_measured_is_not_due_again(tmp_path: Path) -> None:
    """A crash repeats no point; a step that was replayed into another checkpoint replaces its own."""
    Scheduled(tmp_path).measured(200)
    run = Scheduled(tmp_path)
    assert not run.is_due(200)
    assert not run.is_due(250)
    assert run.is_due(200, epoch=2)


def test_nothing_is_due_unless_the_run_file_asks_for_it(tmp_path: Path) -> None:
    """Nor with a target that cannot be decoded."""
    assert not Scheduled(tmp_path, every=0).is_due(1000)
    assert not Scheduled(tmp_path, can_measure=False).is_due(1000)


def test_a_measurement_that_was_killed_is_made_up_for_at_the_next_checkpoint(tmp_path: Path) -> None:
    """Not at the same one, which may have been what killed it; the user reads of it once."""
    run = Scheduled(tmp_path)
    for step in (100, 125):
        assert run.is_due(step)
        run.schedule.begun(head(step))
        assert run.schedule.ended(-9, None) == ""
        assert not run.is_due(step)
    assert run.told == [
        "a measurement beside training failed (it ended by SIGKILL); the next checkpoint is measured instead"
    ]
    run.schedule.ended(2, RoleFailedError("No held-out prompt can be decoded", "why", "next", 2))
    assert "No held-out prompt" in run.told[-1]
    assert run.is_due(150)


def test_a_point_is_told_with_what_was_left_out(tmp_path: Path) -> None:
    """One that came late has measured the newest checkpoint instead of those between."""
    run = Scheduled(tmp_path)
    run.measured(450, 1.46, left_out=marks_left_out(Curve(), 100, 450))
    assert run.told == [
        "step 450: acceptance length 1.46 (chain of 3) on held-out prompts; it was late, and left out the "
        "steps 100, 200, 300"
    ]
    curve = Curve.of([point(100), point(450)])
    assert marks_left_out(curve, 100, 525) == ()
    assert marks_left_out(curve, 100, 730) == (500, 600)
    assert marks_left_out(curve, 100, 210) == ()


def test_a_flat_curve_is_told_in_words_and_stops_nothing(tmp_path: Path) -> None:
    """Unless the run file says so, more training is the user's to decide."""
    run = Scheduled(tmp_path)
    for step, length in ((100, 1.71), (200, 1.71), (300, 1.71)):
        run.measured(step, length)
    assert not any("may not help" in line for line in run.told)
    assert run.measured(400, 1.72) == ""
    assert run.told[-1] == (
        "acceptance length has not risen by more than 0.01 in the last 3 evaluations (1.71, 1.71, 1.72; 1.71 "
        "before): more training on this data may not help"
    )


def test_a_flat_curve_stops_training_if_the_run_file_says_so(tmp_path: Path) -> None:
    """Also after a restart between the point and the stop; not for what was measured before it went on."""
    rule = FlatSection(evaluations=2, gain=0.05)
    run = Scheduled(tmp_path, stop=rule)
    assert run.measured(100, 1.5) == ""
    assert run.measured(200, 1.52) == ""
    assert run.measured(300, 1.54).startswith(
        "acceptance length has not risen by more than 0.05 in the last 2"
    )
    again = Scheduled(tmp_path, stop=rule)
    assert again.schedule.stop_reason()
    again.facts["flat_after"] = 300
    assert not again.schedule.stop_reason()


@pytest.mark.parametrize("section", [{"evaluations": 0}, {"gain": -1.0}, {"evaluation": 3}])
def test_an_impossible_rule_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"evaluation|gain"):
        FlatSection.parse(section)
