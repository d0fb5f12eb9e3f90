"""Two ranks, one of them in a thread: a step happens on both of them or on none."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import FeatureMissingError, RanksError, TrainingError, explained, is_want_of_memory
from paceline.ledger.records import State
from paceline.testing.light_run import RunShape, expected_steps, uninterrupted
from paceline.testing.socket_link import socket_links
from paceline.testing.two_ranks import WAIT_S, Blind, SummingLearner, TwoRanks, closing_links
from paceline.training import ranks as ranks_module
from paceline.training.learner import Sample
from paceline.training.link import Alone, meet
from paceline.training.told_errors import raised_again, told
from paceline.training.worker import FIRST_WEIGHTS, Fetched, StepOrder, Worker
from paceline.types import SampleRef


@pytest.fixture
def run(tmp_path: Path) -> Iterator[TwoRanks]:
    two = TwoRanks(tmp_path)
    with closing_links(*two.links):
        yield two


def test_an_order_is_all_that_a_rank_needs_to_know(run: TwoRanks) -> None:
    """It fetches its own slice, counts it, and holds it; the same order again reads nothing."""
    view = Blind(run.features)
    worker = Worker(SummingLearner(Alone()), view)
    order = StepOrder.of(7, 0, run.refs[:4], rank=1, ranks=2)
    assert worker.fetch(order) == Fetched(num_tokens=4)
    assert worker.fetch(order) == Fetched(num_tokens=4)
    assert view.reads == ["light:2", "light:3"]


class OpeningLearner(SummingLearner):
    """It counts the samples that it was given open."""

    def opened(self, stored: Sample) -> Sample:
        return {**stored, "is open": True}

    def num_tokens(self, samples: Sequence[Sample]) -> int:
        return sum("is open" in sample for sample in samples)


class TogetherStore(Blind):
    """It reads several samples together, and tells of each that it does not find."""

    def get_many(self, refs: Sequence[SampleRef]) -> list[Any]:
        found = list[Any]()
        for ref in refs:
            try:
                found.append(self.get(ref))
            except FeatureMissingError as error:
                found.append(error)
        return found


@pytest.mark.parametrize("together", [False, True])
def test_a_sample_is_opened_however_it_was_read(run: TwoRanks, together: bool) -> None:
    """Ahead or at its step, alone or with others, at the first look or the second; it is read once."""
    view = (TogetherStore if together else Blind)(run.features)
    view.lost = {"light:1"}
    with ThreadPoolExecutor(1) as executor:
        worker = Worker(OpeningLearner(Alone()), view, executor)
        worker.read_ahead(run.refs[:3])
        order = StepOrder.of(7, 0, run.refs[:4], rank=0, ranks=1)
        assert worker.fetch(order) == Fetched(num_tokens=4)
    assert sorted(view.reads) == ["light:0", "light:1", "light:1", "light:2", "light:3"]


def test_a_rank_that_a_short_step_leaves_out_still_knows_a_sample_that_it_trained(run: TwoRanks) -> None:
    learner = SummingLearner(Alone())
    learner.weight = 0.0
    worker = Worker(learner, run.features)
    for step, ranks in ((1, 1), (2, 2)):
        order = StepOrder.of(step, 0, run.refs[:1], rank=ranks - 1, ranks=ranks)
        worker.fetch(order)
        worker.step(order, num_tokens=2)
    assert order.mine == ()
    assert worker.probe(order)


def test_what_one_rank_cannot_fetch_leaves_both_unchanged(run: TwoRanks) -> None:
    """The answer names it; nothing was trained anywhere, and the step is trained once it is there."""
    assert run.ranks.fetch(FIRST_WEIGHTS, 0, run.refs[:4]) == {}
    run.ranks.build()
    run.views[1].lost = {"light:7"}
    unreadable = run.ranks.fetch(1, 0, run.refs[4:8])
    assert list(unreadable) == ["light:7"]
    assert isinstance(unreadable["light:7"], FeatureMissingError)
    assert [learner.weight for learner in run.learners] == [4.0, 4.0]
    assert [learner.steps for learner in run.learners] == [[], []]
    assert run.ranks.fetch(1, 0, run.refs[4:8]) == {}
    run.ranks.step()
    assert [learner.weight for learner in run.learners] == [4.0 + (4 + 5 + 6 + 7) / 4] * 2


def test_what_fails_on_one_rank_happens_on_none(run: TwoRanks) -> None:
    """The exchange of gradients comes before any weight changes; the error is that rank's."""
    run.learners[1].bad = ["light:3"]
    run.ranks.fetch(FIRST_WEIGHTS, 0, run.refs[:3])
    run.ranks.build()
    run.ranks.fetch(1, 0, run.refs[:4])
    with pytest.raises(TrainingError, match="The loss of light:3 is NaN"):
        run.ranks.step()
    assert [learner.weight for learner in run.learners] == [3.0, 3.0]
    assert [learner.steps for learner in run.learners] == [[], []]


def test_a_rank_that_fails_after_another_one_trained_ends_the_attempt(run: TwoRanks) -> None:
    """Their weights differ, and no sample is to blame: nothing is isolated, and no checkpoint is written."""
    run.learners[1].breaks_late = True
    with pytest.raises(RanksError, match="Rank 1 failed in step 1 after another rank had trained it"):
        run.trainer.fit(run.loader)
    assert [record.step for record in run.ledger.snapshot().checkpoints] == [0]
    assert "closed the connection" in run.fail().what


def test_ranks_whose_weights_differ_write_no_checkpoint(run: TwoRanks) -> None:
    run.ranks.fetch(FIRST_WEIGHTS, 0, run.refs[:3])
    run.ranks.build()
    run.learners[1].weight = 3.5
    with pytest.raises(RanksError, match="weights of rank 1 differ"):
        run.trainer.checkpoint()
    assert run.folder.unrecorded([]) == []


def test_a_run_of_two_ranks_trains_every_sample_once_on_one_of_them(run: TwoRanks) -> None:
    """Each step is divided by the tokens of both; the one head checkpoint holds the parts of both.

    Rank 1 gets the first weights from rank 0, and has not read a sample of them.
    """
    assert run.trainer.fit(run.loader) == 3
    run.end()
    first, second = (learner.steps for learner in run.learners)
    assert [ids for _, ids, _ in first] == [[f"light:{n}", f"light:{n + 1}"] for n in (0, 4, 8)]
    assert [ids for _, ids, _ in second] == [[f"light:{n}", f"light:{n + 1}"] for n in (2, 6, 10)]
    assert {tokens for _, _, tokens in [*first, *second]} == {8}
    head = run.folder.read(run.ledger.snapshot().checkpoints[-1])
    assert set(head.files) == {"weight", "of-rank-1"}
    assert head.values["ranks"] == 2
    assert run.learners[0].weight == run.learners[1].weight
    assert run.features.usage().resident_samples == 0
    assert run.views[1].reads == [f"light:{n}" for n in (2, 3, 6, 7, 10, 11)]
    assert run.told == {"epoch": 1}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_culprit_on_any_rank_is_quarantined_and_its_step_trained_on_both(run: TwoRanks, rank: int) -> None:
    """Isolation asks all ranks; the step without it is cut into slices anew."""
    culprit = ("light:5", "light:6")[rank]
    for learner in run.learners:
        learner.bad = [culprit]
    assert run.trainer.fit(run.loader) == 3
    run.end()
    [quarantined] = run.ledger.find(state=State.QUARANTINED).values()
    assert (quarantined.sample_id, quarantined.reason) == (culprit, f"The loss of {culprit} is NaN.")
    steps = [step for learner in run.learners for step in learner.steps if step[0] == 2]
    left = [f"light:{n}" for n in range(4, 8) if f"light:{n}" != culprit]
    assert [ids for _, ids, _ in steps] == [left[:1], left[1:]]
    assert {tokens for _, _, tokens in steps} == {6}
    assert run.learners[0].weight == run.learners[1].weight


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_trains_nothing_on_one_rank_quarantines_no_sample(run: TwoRanks, rank: int) -> None:
    """The other rank's samples can be trained; that this one cannot even train what it has trained before
    tells its machine from its samples."""
    run.learners[rank].breaks_after = 1
    with pytest.raises(TrainingError, match=r"every sample that one rank holds.*no sample was quarantined"):
        run.trainer.fit(run.loader)
    run.end()
    assert run.ledger.find(state=State.QUARANTINED) == {}
    assert [len(learner.steps) for learner in run.learners] == [1, 1]


@pytest.mark.parametrize("first", [2, 6])
def test_bad_samples_that_are_all_a_rank_has_are_quarantined_if_it_can_train(
    run: TwoRanks, first: int
) -> None:
    """Also in the first step, where it has trained none: the other rank shows that the weights are sound."""
    bad = [f"light:{first}", f"light:{first + 1}"]
    for learner in run.learners:
        learner.bad = bad
    assert run.trainer.fit(run.loader) == 3
    run.end()
    assert sorted(run.ledger.find(state=State.QUARANTINED)) == bad


def test_a_process_of_any_rank_that_is_asked_to_stop_stops_all_at_a_safe_point(run: TwoRanks) -> None:
    """Rank 0 hears of it with the next answer, and ends with a checkpoint."""
    run.stops = True
    assert run.trainer.fit(run.loader) < 3
    run.end()
    assert run.ledger.snapshot().head is not None


def test_the_other_ranks_hear_of_rank_0_while_it_builds_the_first_weights(
    run: TwoRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a large target may take longer than the time-out, which would look like its death."""
    monkeypatch.setattr(ranks_module, "BEAT_S", 0.001)
    build = run.learners[0].build

    def slowly(samples: Sequence[Sample]) -> None:
        run.answers.clear()
        assert run.answers.wait(WAIT_S)
        build(samples)

    monkeypatch.setattr(run.learners[0], "build", slowly)
    assert run.trainer.fit(run.loader) == 3
    run.end()


def test_a_rank_whose_coordinator_dies_or_falls_silent_ends(run: TwoRanks) -> None:
    assert "rank 0 closed the connection" in run.fail().what
    first, second = socket_links(2, timeout_s=0.01)
    with closing_links(first, second):
        with pytest.raises(RanksError, match="rank 0: timed out"):
            second.hear()
        with pytest.raises(RanksError, match="rank 1: timed out"):
            first.exchange(b"nobody comes")


def test_ranks_that_are_in_different_calls_go_no_further() -> None:
    first, second = socket_links(2, timeout_s=WAIT_S)
    other = threading.Thread(target=lambda: second.exchange(b"step 4\0"))
    other.start()
    with closing_links(first, second):
        with pytest.raises(RanksError, match="Rank 1 is at 'step 4', and rank 0 is at 'fetch'"):
            meet(first, "fetch", b"")
        other.join()


@pytest.mark.parametrize(
    "error",
    [
        TrainingError("No number.", why="It is NaN.", next="look"),
        FeatureMissingError("Gone.", next="wait"),
        MemoryError("out of memory"),
        KeyError("states"),
        ZeroDivisionError("by 0"),
    ],
)
def test_an_error_is_the_same_on_the_rank_that_hears_of_it(error: Exception) -> None:
    """Its class decides whether a sample may be to blame, its text is the reason on record."""
    again = raised_again(told(error), rank=3)
    assert type(again) is type(error)
    assert explained(again).what == explained(error).what
    assert again.__notes__ == ["on rank 3"]


def test_of_an_unknown_class_the_nearest_known_one_is_raised() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    again = raised_again(told(OutOfMemoryError("CUDA out of memory")), rank=1)
    assert type(again) is RuntimeError
    assert is_want_of_memory(again)
    unicode = raised_again(told(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why")), rank=1)
    assert type(unicode) is UnicodeError


def test_a_sample_that_a_step_visits_twice_is_trained_twice(tmp_path: Path) -> None:
    """With batches larger than groups, two passes meet in one step; the sample is read once."""
    shape = RunShape(prompts=8, group=2, batch=4, passes=2)
    assert expected_steps(shape)[0].count("light:0") == 2
    assert uninterrupted(shape, tmp_path).trained == expected_steps(shape)
