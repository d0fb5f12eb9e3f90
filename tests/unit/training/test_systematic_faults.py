"""What fails with every sample is no sample's fault: training stops with advice and quarantines none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import SQLiteMetadataStore
from paceline.engines.engine import Captured, CaptureRequest
from paceline.errors import ConfigError, FeatureCorruptError, StoreError, TrainingError
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import SourceBlock
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.methods.eagle3.method import Eagle3Method
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.testing.small_run import SmallRun, same_bits, weights
from paceline.testing.synthetic import SyntheticEngine
from paceline.training.torch_learner import TorchLearner
from paceline.types import Feature, SampleRef


def captured(folder: Path, **shape: Any) -> SmallRun:
    """A run whose samples are all there, and none is trained."""
    run = SmallRun(folder, **shape)
    run.producer()[1]()
    return run


def quarantined(run: SmallRun) -> dict[str, str]:
    return SQLiteMetadataStore(run.db).quarantined()


def breaks_after(monkeypatch: pytest.MonkeyPatch, steps: int, raise_: Callable[[], None]) -> list[bool]:
    """A machine on which nothing trains any more once `steps` steps are done; mend it with `[0] = False`."""
    step, attempt, done, is_broken = TorchLearner.step, TorchLearner.attempt, [0], [True]

    def broken_step(self: TorchLearner, *args: Any) -> dict[str, Any]:
        if is_broken[0] and done[0] >= steps:
            raise_()
        done[0] += 1
        return step(self, *args)

    def broken_attempt(self: TorchLearner, *args: Any) -> None:
        if is_broken[0] and done[0] >= steps:
            raise_()
        attempt(self, *args)

    monkeypatch.setattr(TorchLearner, "step", broken_step)
    monkeypatch.setattr(TorchLearner, "attempt", broken_attempt)
    return is_broken


def fails() -> None:
    raise RuntimeError("an illegal instruction was encountered")


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 0), (1, 5), (13, 1), (3, 0), (3, 2)])
def test_a_machine_that_trains_nothing_quarantines_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, steps: int
) -> None:
    """Not with one sample a step, not in the last odd one, not in the first step; and with the machine
    mended the run comes to the weights of one that nothing happened to."""
    plain = weights(SmallRun(tmp_path / "plain", batch_size=batch_size).run())
    run = captured(tmp_path / "run", batch_size=batch_size)
    is_broken = breaks_after(monkeypatch, steps, fails)
    trainer, loader = run.consumer()
    with pytest.raises(TrainingError, match=r"at fault, and no sample was quarantined"):
        trainer.fit(loader)
    assert quarantined(run) == {}
    is_broken[0] = False
    assert same_bits(weights(run.run()), plain)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """NaN in the weights makes every loss NaN; with one sample a step that looked like a bad sample."""
    run = captured(tmp_path, batch_size=1)
    trainer, loader = run.consumer()
    step = TorchLearner.step
    learner = trainer.ranks.worker.learner

    def spoil(number: int, *args: Any) -> dict[str, Any]:
        if number == 3:
            next(trainer.draft.parameters()).data[0] = float("nan")
        return step(learner._part, number, *args)  # type: ignore[attr-defined]

    learner.step = spoil  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"draft's weights are not finite.*no sample was quarantined"):
        trainer.fit(loader)
    assert quarantined(run) == {}


def out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_host_memory() -> None:
    raise MemoryError


def allocator_fails() -> None:
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")


@pytest.mark.parametrize("raise_", [out_of_device_memory, out_of_host_memory, allocator_fails])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_want_of_memory_is_no_samples_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raise_: Callable[[], None], batch_size: int
) -> None:
    """The advice says what to change, and the next start does not suspect the samples of a death."""
    run = captured(tmp_path, batch_size=batch_size)
    is_broken = breaks_after(monkeypatch, 2, raise_)
    for _ in range(4):
        trainer, loader = run.consumer()
        with pytest.raises(TrainingError, match=r"more memory.*training\.micro_batch_size"):
            trainer.fit(loader)
    assert quarantined(run) == {}
    is_broken[0] = False
    run.run()
    assert quarantined(run) == {}


class BadFrom(SyntheticEngine):
    """Its states are NaN from a prompt on, up to another."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.bad = {f"small:{n}" for n in range(first, last + 1)}

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        samples = super().capture(group, features)
        for sample in samples:
            if sample.sample_id in self.bad:
                sample.tensors["last_hidden_states"].fill_(float("nan"))
        return samples


def test_no_more_than_so_many_samples_in_a_row_are_quarantined(tmp_path: Path) -> None:
    """Also over restarts; with a higher limit, which may change in a run, it goes on."""
    run = SmallRun(tmp_path, batch_size=1, training={"quarantine_max_in_a_row": 3})
    run.engine = BadFrom(5, 11)
    run.producer()[1]()
    for _ in range(3):
        trainer, loader = run.consumer()
        with pytest.raises(TrainingError, match=r"3 samples in a row.*quarantine_max_in_a_row"):
            trainer.fit(loader)
        assert list(quarantined(run)) == ["small:5", "small:6", "small:7"]
    run.training = {"quarantine_max_in_a_row": 7}
    run.run()
    assert set(quarantined(run)) == run.engine.bad


class OtherWidth(SyntheticEngine):
    """One prompt's states have half the width."""

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        samples = super().capture(group, features)
        for sample in samples:
            if sample.sample_id == "small:5":
                states = sample.tensors["aux_hidden_states"]
                sample.tensors["aux_hidden_states"] = states[:, ::2].contiguous()
        return samples


@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_sample_of_another_shape_is_quarantined_alone(tmp_path: Path, batch_size: int) -> None:
    """What trained before shows that the place is sound; a sample of the culprit's shape shows nothing."""
    run = SmallRun(tmp_path, batch_size=batch_size)
    run.engine = OtherWidth()
    run.run()
    assert list(quarantined(run)) == ["small:5"]


def test_a_sample_that_trains_ends_the_row(tmp_path: Path) -> None:
    """Bad samples among good ones are quarantined however many there are."""
    run = SmallRun(tmp_path, batch_size=1, training={"quarantine_max_in_a_row": 1})
    run.engine = BadFrom(0, -1)
    run.engine.bad = {f"small:{n}" for n in (5, 7, 9, 11, 13)}
    run.run()
    assert set(quarantined(run)) == run.engine.bad


def test_too_many_bad_samples_in_one_step_quarantine_none(tmp_path: Path) -> None:
    """The limit is asked before the first of them is quarantined."""
    run = SmallRun(tmp_path, batch_size=7, training={"quarantine_max_in_a_row": 3})
    run.engine = BadFrom(8, 12)
    run.producer()[1]()
    trainer, loader = run.consumer()
    with pytest.raises(TrainingError, match="3 samples in a row"):
        trainer.fit(loader)
    assert quarantined(run) == {}


class RottenStore(InMemoryFeatureStore):
    """All bytes but the first samples' are damaged whenever they are read."""

    def get(self, ref: SampleRef) -> dict[str, Any]:
        if int(ref.sample_id.partition(":")[2]) >= 4:
            raise FeatureCorruptError(f"The bytes of {ref.sample_id} are damaged.")
        return super().get(ref)


def test_captures_that_stay_unreadable_stop_training_and_quarantine_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that rots does not bury the data set: the next step's samples cannot be read either."""
    bounded = {"quarantine_max_in_a_row": 2}
    run = captured(tmp_path, features=RottenStore(8 << 20), batch_size=1, training=bounded)
    trainer, loader = run.consumer()
    # While the consumer waits for a sample, a producer comes and captures it again.
    monkeypatch.setattr(trainer.coordinator, "relieve_pressure", lambda: run.producer()[1]())
    with pytest.raises(
        StoreError, match=r"can read no sample, and those of step 5 were captured again 5 times"
    ):
        trainer.fit(loader)
    assert quarantined(run) == {}


def test_a_feature_store_in_another_place_quarantines_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The producer captures again, into its own store, which this consumer does not see."""
    run = captured(tmp_path)
    theirs, ours = run.features, InMemoryFeatureStore(8 << 20)
    run.features = ours
    trainer, loader = run.consumer()

    def capture_again() -> None:
        run.features = theirs
        lost = set(SQLiteMetadataStore(run.db).lost_ids())
        theirs.free([written for written in theirs.written() if written[0] in lost])
        run.producer()[1]()

    monkeypatch.setattr(trainer.coordinator, "relieve_pressure", capture_again)
    with pytest.raises(StoreError, match=r"same features.directory") as caught:
        trainer.fit(loader)
    assert theirs._uri in str(caught.value)  # type: ignore[attr-defined]
    assert ours._uri in str(caught.value)
    assert quarantined(run) == {}


def test_a_stream_that_ends_without_a_sample_is_an_error(tmp_path: Path) -> None:
    """Every prompt failed: to end well would have the consumer started again without end."""
    run = SmallRun(tmp_path)
    session = ProducerSession(SQLiteLedger(run.db), "small")
    session.acquire()
    session.extend([SourceBlock(0, 2, "two")])
    session.lease(2)
    session.fail([0, 1], "it has no text", retryable=False)
    assert session.end_stream()
    trainer, loader = run.consumer()
    with pytest.raises(TrainingError, match=r"without a sample to train: 2 prompts failed.*it has no text"):
        trainer.fit(loader)


def test_settings_that_do_not_fit_the_target_are_said_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the build of the first weights they are no sample's fault, nor the learning rate's."""

    def refuse(*_: Any) -> None:
        raise ConfigError("draft_vocab_size=8192 does not fit 61 tokens", next="set it to 61")

    run = captured(tmp_path)
    monkeypatch.setattr(Eagle3Method, "build", refuse)
    trainer, loader = run.consumer()
    with pytest.raises(ConfigError, match="does not fit 61 tokens"):
        trainer.fit(loader)
    assert quarantined(run) == {}


def test_settings_are_held_against_the_target_before_anything_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the consumer is built, with nothing captured yet."""

    def refuse(*_: Any) -> None:
        raise ConfigError("draft_vocab_size=8192 does not fit 61 tokens", next="set it to 61")

    monkeypatch.setattr(Eagle3Method, "check_target", refuse)
    with pytest.raises(ConfigError, match="does not fit 61 tokens"):
        SmallRun(tmp_path).consumer()
