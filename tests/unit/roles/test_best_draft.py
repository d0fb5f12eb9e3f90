"""Which draft a run gives away, and what is held of measured checkpoints wherever the evaluator is killed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline import crashpoints
from paceline.errors import CheckpointError
from paceline.evaluation.curve import FILE, read_curve
from paceline.evaluation.marked import MarkedAnswer, read_marked
from paceline.fsck.checker import check
from paceline.ledger.records import CheckpointRecord
from paceline.roles import best_draft, curve_recorder, draft
from paceline.roles.curve_recorder import measure_beside
from paceline.roles.draft import checkpoint_of_step, draft_to_give, hold_newest
from paceline.roles.measured_draft import Answers
from paceline.testing.recording_files import Killed
from paceline.testing.run_by_hand import RunByHand

FILES = ("weights.bin",)


class MeasuredRun:
    """A run whose evaluator finds the acceptance lengths that the test gives it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.length, self.measured = folder, 1.0, list[int]()
        self.run = RunByHand(folder)
        self.run.ledger.set_facts(None, {"rendering_date": "today"})
        self.config: Any = SimpleNamespace(
            checkpoint_folder=folder / "checkpoints",
            run=SimpleNamespace(name="run0", directory=folder),
            evaluation=SimpleNamespace(every_steps=2, max_new_tokens=8, draft_tokens=3, branching=1, depth=3),
        )
        for module in (best_draft, curve_recorder):
            monkeypatch.setattr(module, "DRAFT", "weights.bin")
        head = SimpleNamespace(eos_token_ids=(2,))
        built: Callable[..., Any] = lambda _, checkpoint, date: SimpleNamespace(  # noqa: E731
            step=checkpoint.step, head=head, dtype=date, chain=3, drafter=None
        )
        monkeypatch.setattr(curve_recorder, "build_measured_draft", built)
        monkeypatch.setattr(
            curve_recorder, "held_out_of", lambda *_: SimpleNamespace(prompts=((1, 2),), left_out={})
        )
        monkeypatch.setattr(curve_recorder, "measure_held_out", self._report)

    def _report(
        self, _: object, measured: Any, __: object, *, with_plain: bool, answers: Answers
    ) -> dict[str, Any]:
        assert not with_plain, "plain decoding beside training tells nothing"
        answers.of_ways["chain"].append(MarkedAnswer.of("p", (1,), (2, 3), (1,)))
        self.measured.append(measured.step)
        way = {
            "prompts": 1,
            "num_draft_tokens": 3,
            "branching": 1,
            "acceptance_length": self.length,
            "emitted_per_cycle": self.length,
            "acceptance_rate": [0.5],
        }
        return {**way, "chain": way}

    def train(self, steps: int, content: bytes | None = None) -> CheckpointRecord:
        """Steps with a checkpoint each, of different bytes."""
        for _ in range(steps):
            self.run.train(self.run.capture(1))
            step = self.run.ledger.snapshot().trained_step
            self.run.weights = content or b"weights %d" % step
            self.run.checkpoint()
        head = self.run.ledger.snapshot().head
        assert head is not None
        return head

    def measure(self, length: float) -> None:
        self.length = length
        measure_beside(self.config, self.view)

    @property
    def view(self) -> Any:
        return self.run.ledger

    def given(self, step: int | None = None) -> tuple[int, str]:
        checkpoint, choice = draft_to_give(self.config, self.view, step, FILES)
        assert checkpoint.files["weights.bin"] == b"weights %d" % checkpoint.step
        return checkpoint.step, choice.why

    def held(self) -> list[int]:
        names = sorted(path.name for path in (self.folder / "checkpoints" / "best").iterdir())
        assert all("." not in name for name in names), names
        return [int(name.split("-")[1]) for name in names]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MeasuredRun:
    return MeasuredRun(tmp_path, monkeypatch)


def test_without_a_measurement_the_newest_is_given(run: MeasuredRun) -> None:
    run.train(2)
    assert run.given() == (2, "the newest; no checkpoint was measured")


def test_the_best_is_kept_and_given_long_after_its_checkpoint_was_retired(run: MeasuredRun) -> None:
    """With what it is the best of; a run goes on from its newest checkpoint all the same."""
    for length in (1.4, 1.6, 1.5, 1.3):
        run.train(2)
        run.measure(length)
    assert run.held() == [4]
    marked = read_marked(run.folder, run.run.ledger.facts())
    assert marked is not None
    assert (marked.step, marked.guesses) == (8, {"chain": "chain of 3"}), "the answers are the newest's"
    step, why = run.given()
    assert step == 4
    assert why == (
        "the best of 4 evaluations: acceptance length 1.60 (chain of 3); the last measured, step 8: "
        "1.30 (chain of 3)"
    )
    assert [record.step for record in run.run.ledger.snapshot().checkpoints] == [7, 8]
    assert check(run.folder).errors == []


def test_answers_that_cannot_be_written_cost_no_measurement(
    run: MeasuredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: the point is there, and it is said why its answers are not. Otherwise they come first, so
    that whoever sees the point finds them."""
    run.train(2)
    run.measure(1.6)
    kept, told = read_marked(run.folder, run.run.ledger.facts()), list[dict[str, Any]]()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(curve_recorder, "write_marked", refuse)
    run.train(2)
    measure_beside(run.config, run.view, lambda event, **more: told.append({"event": event, **more}))
    assert [point.step for point in read_curve(run.folder, run.run.ledger.facts()).points] == [2, 4]
    why = "[Errno 28] No space left on device"
    assert told == [{"event": "answers_not_kept", "step": 4, "why": why}]
    assert read_marked(run.folder, run.run.ledger.facts()) == kept


def test_a_step_may_be_asked_for_instead(run: MeasuredRun) -> None:
    """One of the newest, or the best; the error names them all."""
    run.train(2)
    run.measure(1.6)
    run.train(4)
    run.measure(1.5)
    assert run.given(6)[0] == 6
    assert run.given(2) == (2, "as asked for")
    with pytest.raises(CheckpointError, match="keeps those of the steps 2, 5, 6"):
        checkpoint_of_step(run.config, run.view, 3, FILES)


def test_a_newest_checkpoint_that_the_curve_does_not_reach_is_given(run: MeasuredRun) -> None:
    """A look at a run's beginning must not decide what its end gives away."""
    run.train(1)
    run.measure(1.6)
    run.train(2)
    assert run.given()[0] == 1, "at most evaluation.every_steps further"
    run.train(1)
    step, why = run.given()
    assert step == 4
    assert why == "the newest; it was not measured, the last one that was is that of step 1"


def test_a_best_draft_that_is_damaged_is_not_given_and_the_answer_says_so(run: MeasuredRun) -> None:
    """The newest is the next best thing."""
    run.train(2)
    run.measure(1.6)
    record = run.train(1)
    [held] = (run.folder / "checkpoints" / "best").iterdir()
    (held / "weights.bin").unlink()
    (held / "weights.bin").write_bytes(b"weights ?")
    step, why = run.given()
    assert step == record.step
    assert "the newest, because the best, step 2, cannot be used" in why


POINTS = ("held.before_rename", "evaluation.held", "evaluation.measured", "evaluation.recorded")
REMOVAL = "checkpoint.after_set_aside"


@pytest.mark.parametrize("place", [*POINTS, REMOVAL])
@pytest.mark.parametrize("lengths", [(1.4, 1.6), (1.6, 1.4)])
def test_an_evaluator_killed_anywhere_loses_and_repeats_no_point(
    run: MeasuredRun, place: str, lengths: tuple[float, float]
) -> None:
    """The best draft on record is there at once, and the next measurement leaves nothing but the best."""
    run.train(2)
    run.measure(lengths[0])
    run.train(2)

    def kill(name: str) -> None:
        if name == place:
            raise Killed(name)

    crashpoints.watch(kill)
    try:
        with pytest.raises(Killed):
            run.measure(lengths[1])
    finally:
        crashpoints.watch(None)
    steps = [point.step for point in read_curve(run.folder, run.view.facts()).points]
    was_recorded = place in ("evaluation.recorded", REMOVAL)
    assert steps == ([2, 4] if was_recorded else [2])
    assert run.given()[0] == (4 if was_recorded and lengths[1] > lengths[0] else 2)
    assert check(run.folder).errors == []
    run.measure(lengths[1])
    assert run.measured.count(4) <= 2 - was_recorded
    assert [point.step for point in read_curve(run.folder, run.view.facts()).points] == [2, 4]
    assert run.held() == [2 if lengths[0] > lengths[1] else 4]


def test_the_same_draft_is_not_measured_twice_and_another_one_of_its_step_is(run: MeasuredRun) -> None:
    """After a roll-back a replayed step has the same bits, or, with an engine that repeats none, others."""
    run.train(2)
    run.measure(1.6)
    first = read_curve(run.folder, run.view.facts()).points
    run.measure(1.1)
    assert run.measured == [2]
    assert read_curve(run.folder, run.view.facts()).points == first
    path = run.folder / FILE
    path.write_text(path.read_text().replace(first[0].draft, "0" * 64))
    run.measure(1.1)
    [again] = read_curve(run.folder, run.view.facts()).points
    assert run.measured == [2, 2]
    assert again.acceptance_length == 1.1


def test_what_is_late_is_on_record(run: MeasuredRun) -> None:
    """Each point says which steps were due before it and could not be measured."""
    run.train(2)
    run.measure(1.4)
    run.train(7)
    run.measure(1.5)
    assert [point.left_out for point in read_curve(run.folder, run.view.facts()).points] == [(), (4, 6)]


def test_a_checkpoint_that_is_retired_while_it_is_chosen_is_not_missed(
    run: MeasuredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on meanwhile; the newest one is held then."""
    run.train(2)
    newest = draft._newest

    def slow(*arguments: Any) -> Any:
        found = newest(*arguments)
        if run.run.ledger.snapshot().trained_step < 5:
            run.train(3)
        return found

    monkeypatch.setattr(draft, "_newest", slow)
    checkpoint, record = hold_newest(run.config, run.view, FILES)
    assert (checkpoint.step, record.step) == (5, 5)
    assert run.held() == [5]
