"""Training on kept samples makes the steps of a run, or those of a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from paceline.errors import ConfigError
from paceline.training import replay
from paceline.training.replay import KeptSample, batches_of_run, for_tokens, steps_within, train
from paceline.training.settings import TrainingSection

SAMPLES = [KeptSample(f"s{place}", place, 10) for place in range(10) if place != 5]  # prompt 5 failed


def places(batches: Sequence[Sequence[KeptSample]]) -> list[list[int]]:
    return [[sample.place for sample in batch] for batch in batches]


class Learner:
    """Counts what it is asked for; a step takes a second of the clock."""

    def __init__(self) -> None:
        self.now, self.built, self.steps, self.checked = 0.0, 0, list[Any](), list[Any]()

    def check_greedy(self, samples: Sequence[Any]) -> None:
        self.checked = list(samples)

    def build(self, samples: Sequence[Any]) -> None:
        self.built, self.now = len(samples), self.now + 5

    def step(
        self,
        step: int,
        samples: Sequence[Any],
        num_tokens: int | None = None,
        progress: float | None = None,
    ) -> dict[str, Any]:
        self.steps.append((step, list(samples)))
        self.now += 1
        return {"loss": 1.0}


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> Learner:
    made = Learner()
    monkeypatch.setattr(replay, "monotonic", lambda: made.now)
    return made


def section(**values: Any) -> TrainingSection:
    return TrainingSection(**{"batch_size": 2, "micro_batch_size": 1, **values})


def test_the_visits_are_those_of_a_run() -> None:
    """Blocks of four, the second pass of a block beside the first of the next; the tail is trained."""
    assert places(batches_of_run(SAMPLES, 4, section())) == [[0, 1], [2, 3], [4, 6], [7, 8], [9]]
    visits = [place for batch in places(batches_of_run(SAMPLES, 4, section(passes=2))) for place in batch]
    assert visits == [0, 1, 2, 3, 4, 0, 6, 1, 7, 2, 3, 8, 4, 9, 6, 7, 8, 9]
    assert batches_of_run([], 4, section()) == []


def test_a_budget_of_tokens_ends_with_a_whole_batch() -> None:
    batches = batches_of_run(SAMPLES, 4, section())
    assert places(for_tokens(batches, 41)) == [[0, 1], [2, 3], [4, 6]]
    assert places(for_tokens(batches, 40)) == [[0, 1], [2, 3]]
    again = for_tokens(batches, 121)
    assert places(again)[4:] == [[9], [0, 1], [2, 3]]


def test_samples_without_a_token_to_learn_are_refused() -> None:
    """They would be gone over for ever."""
    empty = [KeptSample("s", 0, 0)]
    with pytest.raises(ConfigError, match="None of 1 samples has a token"):
        for_tokens(batches_of_run(empty, 4, section()), 5)


def test_the_first_weights_come_before_the_steps(learner: Learner) -> None:
    batches = batches_of_run(SAMPLES, 4, section())
    found = train(
        learner, SAMPLES[:3], batches, lambda sample: {"x": sample.place}, greedy=lambda s: s.place == 1
    )
    assert learner.built == 3
    assert learner.checked == [{"x": 1}]
    assert [step for step, _ in learner.steps] == [1, 2, 3, 4, 5]
    assert learner.steps[4] == (5, [{"x": 9}])
    assert (found.steps, found.samples, found.tokens, found.seconds, found.step_ms) == (5, 9, 90, 10, 1000)


def test_training_ends_when_its_time_is_up(learner: Learner) -> None:
    """The first weights take their part of it."""
    batches = batches_of_run(SAMPLES, 4, section())
    found = train(learner, SAMPLES[:1], batches, lambda _: {}, seconds=7.5)
    assert (found.steps, found.seconds) == (3, 8)


def test_the_steps_that_fit_leave_room_for_the_first_weights(learner: Learner) -> None:
    batches = batches_of_run(SAMPLES, 4, section())
    assert steps_within(100, learner, SAMPLES[:1], batches, lambda _: {}) == 95
    assert len(learner.steps) == 4
    assert steps_within(1000, learner, SAMPLES[:1], batches, lambda _: {}) == 995
    assert len(learner.steps) == 24
