"""Steps that are cut by tokens: after a crash, a roll forward or a replay they are the same steps."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import crashpoints
from paceline.errors import ConfigError, LedgerError
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.records import Entry, StepPlan
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.lengths import Lengths
from paceline.loader.loader import StepLoader
from paceline.loader.settings import LoaderSettings
from paceline.testing import ledger_calls
from paceline.testing.ledger_calls import capture, consumer_of, producer_of
from paceline.testing.light_adapters import uneven_length
from paceline.testing.light_run import RUN_ID, LightRun, RunShape, expected_steps, head_of, uninterrupted
from paceline.testing.samples import sample_ref
from paceline.testing.small_run import SmallRun, same_bits, weights
from paceline.training.optimizer import learning_rate_at
from paceline.training.replay import KeptSample, batches_of_run, progress_of_run
from paceline.training.settings import TrainerSettings, TrainingSection
from paceline.training.step import micro_batches

SHAPE = RunShape(prompts=14, group=4, passes=2, interval=3, tokens=50)


class Killed(BaseException):
    pass


def killed_before(loader: Any, step: int) -> None:
    real: Callable[[int], Any] = loader.next_step

    def next_step(number: int) -> Any:
        if number >= step:
            raise Killed
        return real(number)

    loader.next_step = next_step


@pytest.mark.parametrize("step", [2, 5])
def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path, step: int) -> None:
    """With the learning rate of the share of its visits, which is on record nowhere."""
    training = {"tokens_per_step": 30, "micro_batch_tokens": 18, "warmup_steps": 3, "passes": 2}
    plain = weights(SmallRun(tmp_path / "plain", training=training, passes=2).run())
    run = SmallRun(tmp_path / "killed", training=training, passes=2)
    run.producer()[1]()
    trainer, loader = run.consumer()
    killed_before(loader, step)
    with pytest.raises(Killed):
        trainer.fit(loader)
    assert same_bits(weights(run.run()), plain)


def test_a_ledger_without_the_lengths_learns_them_from_the_captures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was restored from before all commits and rolled forward: what is between its two visits is an id
    there, lost, until it is captured again."""
    run = LightRun(tmp_path / "run", SHAPE)
    run.folder.mkdir()
    ledger = run.open_ledger()
    ledger.acquire("consumer", "a start before all others")
    ledger.close()
    backup = run.ledger_path.read_bytes()
    run.produce()
    crashpoints.watch(raise_at("ledger.head.before", turn=3))  # after steps 0 and 3
    with pytest.raises(InterruptedError):
        run.consume()
    crashpoints.watch(None)
    for path in run.folder.glob("ledger.db*"):
        path.unlink()
    run.ledger_path.write_bytes(backup)
    learned: list[str] = []
    real = Lengths._length_of

    def length_of(self: Lengths, entry: Entry) -> int:
        learned.append(entry.sample_id)
        return real(self, entry)

    monkeypatch.setattr(Lengths, "_length_of", length_of)
    producer = threading.Thread(target=run.produce)
    wait = StepLoader._wait

    def wait_for_the_producer(self: StepLoader, mark: int) -> None:
        if producer.ident is None:
            producer.start()
        wait(self, mark)

    monkeypatch.setattr(StepLoader, "_wait", wait_for_the_producer)
    run.consume()
    producer.join()
    assert learned, "the log has no length of some samples"
    ledger = run.open_ledger()
    assert head_of(ledger, run.checkpoints) == uninterrupted(SHAPE, tmp_path / "undisturbed")
    ledger.close()


def raise_at(point: str, turn: int) -> Callable[[str], None]:
    reached = Counter[str]()

    def watch(name: str) -> None:
        reached[name] += 1
        if name == point and reached[name] == turn:
            raise InterruptedError

    return watch


def loader_of(ledger: SQLiteLedger, tokens: int) -> StepLoader:
    return StepLoader(consumer_of(ledger), LoaderSettings(1, tokens_per_step=tokens, block_size=2))


def planned(loader: StepLoader, step: int) -> list[str]:
    found = loader.next_step(step)
    assert found is not None
    return found.sample_ids


@pytest.mark.parametrize("tokens", [4, 8, 12])
def test_a_plan_on_record_wins_over_lengths_that_have_changed(tokens: int) -> None:
    """A sample that was captured again without its kept answer may be longer or shorter; the step that was
    planned is replayed, and the next one begins after it."""
    ledger = SQLiteLedger()
    capture(producer_of(ledger), *range(6))  # of 4 tokens each
    first = planned(loader_of(ledger, 8), 1)
    assert first == ["run0:s0", "run0:s1"]
    again = loader_of(ledger, tokens)
    assert planned(again, 1) == first
    assert planned(again, 2)[0] == "run0:s2"


def test_a_plan_that_the_log_contradicts_is_refused() -> None:
    ledger = SQLiteLedger()
    capture(producer_of(ledger), *range(6))
    consumer_of(ledger).plan(StepPlan(1, ("run0:s1", "run0:s0")))
    with pytest.raises(LedgerError, match="was planned as"):
        loader_of(ledger, 4).next_step(1)


def test_refs_without_a_length_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer of one's own may leave it out; nothing is planned then."""
    ledger = SQLiteLedger()
    monkeypatch.setattr(
        ledger_calls, "sample_ref", lambda *a, **k: replace(sample_ref(*a, **k), num_tokens=0)
    )
    capture(producer_of(ledger), 0, 1)
    with pytest.raises(ConfigError, match="does not say how many tokens"):
        loader_of(ledger, 8).next_step(1)
    assert ledger.step_plan(1) is None


def test_what_is_read_ahead_is_the_next_step(tmp_path: Path) -> None:
    """As far as it is committed."""
    ledger = SQLiteLedger()
    producer = producer_of(ledger)
    capture(producer, *range(5))
    loader = loader_of(ledger, 12)
    planned(loader, 1)
    assert [ref.sample_id for ref in loader.following()] == ["run0:s3"]
    capture(producer, 5)
    assert [ref.sample_id for ref in loader.following()] == ["run0:s3", "run0:s4", "run0:s5"]


# -- what follows from it ----------------------------------------------------------------------


def test_a_comparison_makes_the_steps_of_the_run(tmp_path: Path) -> None:
    """The same samples, and the same share of the run after each."""
    run = LightRun(tmp_path / "run", SHAPE)
    run.produce()
    ledger = run.open_ledger()
    loader = StepLoader(ConsumerSession(ledger, RUN_ID), run.shape.loading())
    loader._session.acquire()
    steps = [loader.next_step(number) for number in range(1, len(expected_steps(SHAPE)) + 1)]
    ledger.close()
    samples = [
        KeptSample(f"{RUN_ID}:{n}", n, 1, uneven_length(f"{RUN_ID}:{n}")) for n in range(SHAPE.prompts)
    ]
    training = TrainingSection(tokens_per_step=SHAPE.tokens, passes=2)
    batches = batches_of_run(samples, SHAPE.group, training)
    assert [[sample.sample_id for sample in batch] for batch in batches] == expected_steps(SHAPE)
    shares = progress_of_run(samples, SHAPE.group, training, SHAPE.prompts)
    assert shares == [step and step.progress for step in steps]
    assert shares[-1] == 1.0


def rates(progress: list[float | None], **training: Any) -> list[float]:
    section = TrainingSection(
        learning_rate=1.0, final_learning_rate=0.2, warmup_steps=2, tokens_per_step=9, **training
    )
    settings = TrainerSettings(None, 1, training=section)
    return [learning_rate_at(step, settings, share) for step, share in enumerate(progress, 1)]


def test_the_rate_falls_with_the_share_of_the_run() -> None:
    """By a cosine with the warm-up as a factor, to its end at the last visit or at `max_steps`."""
    assert rates([0.0, 0.0, 0.5, 1.0]) == pytest.approx([0.5, 1.0, 0.6, 0.2])
    assert rates([0.0, 0.1, 0.1, 0.2], max_steps=4)[1:] == pytest.approx([0.6, 0.317157, 0.2], abs=1e-6)
    assert rates([None, None, None]) == [0.5, 1.0, 1.0], "without an end it stays"


def test_micro_batches_are_cut_by_tokens() -> None:
    """A sample of n + 1 tokens counts n; one that is longer is alone."""
    samples = [{"input_ids": torch.zeros(n + 1), "states": torch.zeros(n, 2)} for n in (3, 2, 9, 4, 1, 1)]
    parts = micro_batches(samples, TrainingSection(micro_batch_tokens=6))
    assert [[len(sample["states"]) for sample in part] for part in parts] == [[3, 2], [9], [4, 1, 1]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tokens_per_step": 100, "batch_size": 4}, "tokens_per_step is instead of training.batch_size"),
        ({"micro_batch_tokens": 9, "micro_batch_size": 2}, "instead of training.micro_batch_size"),
        ({"tokens_per_step": 8, "micro_batch_tokens": 9}, "micro_batch_tokens must not exceed"),
    ],
)
def test_a_step_has_one_size(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainingSection(**given)


def test_a_recorded_run_file_may_name_the_sizes_that_are_not_read() -> None:
    section = TrainingSection(tokens_per_step=4)
    assert TrainingSection(**section.model_dump()) == section
