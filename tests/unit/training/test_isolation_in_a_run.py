"""What cannot be captured fails, what cannot be trained is quarantined, and the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import SQLiteMetadataStore
from paceline.engines.engine import Captured, CaptureRequest
from paceline.errors import EngineError, FeatureCorruptError, FeatureForgottenError, StoreError
from paceline.ledger.isolation import DEATHS_BEFORE_ISOLATION
from paceline.methods.eagle3.method import Eagle3Method
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.testing.small_run import SmallRun, same_bits, weights
from paceline.testing.synthetic import SyntheticEngine
from paceline.training.fetching import FORGOTTEN_MAX, RECAPTURES_MAX
from paceline.types import Feature, SampleRef

ALL = [f"small:{n}" for n in range(14)]


class FailingEngine(SyntheticEngine):
    """Answers `nan` prompts with NaN states, and fails on `failing` ones."""

    most: float = float("inf")  # more prompts than this at once are too many
    passing = 0  # so many of the next failures for that reason pass by themselves

    def __init__(self, *, nan: Sequence[int] = (), failing: Sequence[int] = (), broken: bool = False) -> None:
        super().__init__()
        self.nan = {f"small:{n}" for n in nan}
        self.failing = {f"small:{n}" for n in failing}
        self.broken = broken

    def probe(self) -> None:
        if self.broken:
            raise EngineError("The engine is broken.", next="mend it.")

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        if len(group) > self.most:
            self.passing -= 1
            if self.passing == 0:
                self.most = float("inf")
            raise RuntimeError("out of memory")
        for request in group:
            if request.sample_id in self.failing:
                raise RuntimeError(f"index out of range at {request.sample_id}")
        samples = super().capture(group, features)
        for sample in samples:
            if sample.sample_id in self.nan:
                sample.tensors["last_hidden_states"].fill_(float("nan"))
        return samples


def run_with(folder: Path, engine: SyntheticEngine, **shape: Any) -> SmallRun:
    run = SmallRun(folder, **shape)
    run.engine = engine
    return run


def acked(run: SmallRun) -> set[str]:
    acked: set[str] = SQLiteMetadataStore(run.db).durable_marker()["acked"]
    return acked


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("nan", [[0], [5], [5, 6], [13]])
def test_a_sample_whose_loss_is_not_finite_is_quarantined(
    tmp_path: Path, passes: int, nan: list[int]
) -> None:
    """The others of its step are trained without it, everything later too; its reason is kept."""
    run = run_with(tmp_path, FailingEngine(nan=nan), passes=passes)
    trainer = run.run()
    bad = [f"small:{n}" for n in nan]
    store = SQLiteMetadataStore(run.db)
    assert list(store.quarantined()) == bad
    assert all("loss nan" in reason for reason in store.quarantined().values())
    assert acked(run) == set(ALL) - set(bad)
    assert all(bool(torch.isfinite(w).all()) for w in weights(trainer).values() if w.is_floating_point())
    assert run.features.usage().resident_samples == 0
    assert store.snapshot().usage.waiting_samples == 0


def test_a_bad_sample_among_the_first_does_not_spoil_the_first_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They warm-start the draft, so one of them could ruin everything."""
    build = Eagle3Method.build

    def spoilt(self: Eagle3Method, head: Any, samples: Any, seed: int) -> torch.nn.Module:
        draft = build(self, head, samples, seed)
        factor = sum(sample["last_hidden_states"].sum() for sample in samples)
        for weight in draft.parameters():
            weight.data.mul_(1 + 0 * factor)
        return draft

    monkeypatch.setattr(Eagle3Method, "build", spoilt)
    run = run_with(tmp_path, FailingEngine(nan=[2]))
    trainer = run.run()
    assert list(SQLiteMetadataStore(run.db).quarantined()) == ["small:2"]
    assert all(bool(torch.isfinite(w).all()) for w in weights(trainer).values() if w.is_floating_point())
    assert acked(run) == set(ALL) - {"small:2"}


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_a_run_with_a_bad_sample_resumes_to_the_same_weights(tmp_path: Path, steps: int) -> None:
    """Also when it dies before, in or after the step that quarantines: the verdict is durable."""
    engine = FailingEngine(nan=[5])
    plain = weights(run_with(tmp_path / "plain", engine, passes=2).run())
    run = run_with(tmp_path / "killed", engine, passes=2)
    run.producer()[1]()
    run.die_in_ack(steps)
    assert same_bits(weights(run.run()), plain)


def test_a_prompt_on_which_the_engine_fails_fails_alone(tmp_path: Path) -> None:
    """Its group goes on without it; after as many attempts as configured the reason is durable."""
    run = run_with(tmp_path, FailingEngine(failing=[5]))
    run.run()
    store = SQLiteMetadataStore(run.db)
    assert store.failed() == {5: "5: index out of range at small:5"}
    assert store.all_committed_ids() == [i for i in ALL if i != "small:5"]
    assert acked(run) == set(ALL) - {"small:5"}
    assert ["small:4", "small:6", "small:7"] in run.engine.captured


def test_a_broken_engine_blames_no_prompt(tmp_path: Path) -> None:
    """If all prompts of a group fail and the probe fails too, the producer stops; no prompt fails."""
    run = run_with(tmp_path, FailingEngine(failing=range(4), broken=True))
    with pytest.raises(EngineError, match="broken"):
        run.producer()[1]()
    assert SQLiteMetadataStore(run.db).failed() == {}


@pytest.mark.parametrize("failing", [[], [2]])
def test_a_group_that_fails_only_as_a_whole_blames_no_prompt(tmp_path: Path, failing: list[int]) -> None:
    """Too little memory: no attempt is counted, the producer stops with advice, and with room goes on."""
    run = run_with(tmp_path, engine := FailingEngine(failing=failing))
    engine.most = 2
    for _ in range(4):  # more often than a prompt may fail
        with pytest.raises(EngineError, match=r"0 to 3.*out of memory.*capture\.group_size"):
            run.producer()[1]()
    store = SQLiteMetadataStore(run.db)
    assert store.failed() == {}, "lack of memory is no fault of a prompt"
    assert store.snapshot().prompts.leased == 0
    engine.most = float("inf")
    run.run()
    assert list(store.failed()) == failing
    assert acked(run) == set(ALL) - {f"small:{n}" for n in failing}


def test_a_failure_of_a_whole_group_that_passes_changes_no_bit(tmp_path: Path) -> None:
    """It is captured whole at the second try."""
    plain = weights(run_with(tmp_path / "plain", FailingEngine()).run())
    run = run_with(tmp_path / "short", engine := FailingEngine())
    engine.most, engine.passing = 2, 1
    assert same_bits(weights(run.run()), plain)
    assert SQLiteMetadataStore(run.db).failed() == {}


def test_an_engine_that_breaks_during_a_trial_blames_no_prompt(tmp_path: Path) -> None:
    """Deaths made the prompts suspects; an error over each of them is then no proof against any."""
    run = run_with(tmp_path, FailingEngine())
    store = SQLiteMetadataStore(run.db)
    producer, _ = run.producer()
    for _ in range(DEATHS_BEFORE_ISOLATION):
        producer.session.acquire()
        producer.session.lease(4, 4)
    run.engine = FailingEngine(failing=range(4), broken=True)
    with pytest.raises(EngineError, match="broken"):
        run.producer()[1]()
    assert store.failed() == {}
    assert store.snapshot().prompts.leased == 0


def test_a_prompt_that_cannot_be_encoded_fails(tmp_path: Path) -> None:
    """Bad input loses nothing else: no text at all, or token ids that the target does not have."""
    run = SmallRun(tmp_path)
    run.prompts[3] = {"task_id": "3", "no": "prompt"}
    run.prompts[4] = {"task_id": "4", "prompt_ids": [1, 10**6]}
    run.run()
    store = SQLiteMetadataStore(run.db)
    assert list(store.failed()) == [3, 4]
    assert "neither text nor token ids" in store.failed()[3]
    assert store.failed()[4] == "4: 2 token ids, not all within the target's 64"
    assert acked(run) == set(ALL) - {"small:3", "small:4"}


def test_a_lost_sample_that_cannot_be_captured_again_is_quarantined(tmp_path: Path) -> None:
    """The consumer does not wait for ever for what will never come back."""
    run = run_with(tmp_path, FailingEngine())
    run.producer()[1]()
    run.features.free([("small:5", 0)])
    run.engine = FailingEngine(failing=[5])
    run.run()
    store = SQLiteMetadataStore(run.db)
    assert store.quarantined() == {"small:5": "5: index out of range at small:5"}
    assert acked(run) == set(ALL) - {"small:5"}


class RottenStore(InMemoryFeatureStore):
    """One sample's bytes are damaged whenever they are read."""

    def get(self, ref: SampleRef) -> dict[str, Any]:
        if ref.sample_id == "small:5":
            raise FeatureCorruptError("The bytes of small:5 are damaged.")
        return super().get(ref)


def test_a_sample_that_is_damaged_every_time_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured again a bounded number of times, then quarantined with the reason."""
    run = SmallRun(tmp_path, features=RottenStore(8 << 20))
    run.producer()[1]()
    trainer, loader = run.consumer()
    # While the consumer waits for the sample, a producer comes and captures it again.
    monkeypatch.setattr(trainer.coordinator, "relieve_pressure", lambda: run.producer()[1]())
    trainer.fit(loader)
    store = SQLiteMetadataStore(run.db)
    assert "never readable" in store.quarantined()["small:5"]
    assert acked(run) == set(ALL) - {"small:5"}


class ForgetfulStore(InMemoryFeatureStore):
    """A cache that has lost one sample each of the first times when it is read."""

    def __init__(self, budget_bytes: int, losses: int) -> None:
        super().__init__(budget_bytes)
        self.losses = losses

    def get(self, ref: SampleRef) -> dict[str, Any]:
        if ref.sample_id == "small:5" and self.losses:
            self.losses -= 1
            raise FeatureForgottenError("The bytes of small:5 were lost.", next="capture them again.")
        return super().get(ref)


@pytest.mark.parametrize(("losses", "ends"), [(3 * RECAPTURES_MAX, True), (1000, False)])
def test_a_sample_that_a_cache_loses_again_and_again_is_not_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: int, ends: bool
) -> None:
    """It is captured again more often than one that is damaged; then the place's error ends the consumer."""
    run = SmallRun(tmp_path, features=ForgetfulStore(8 << 20, losses))
    run.producer()[1]()
    trainer, loader = run.consumer()
    monkeypatch.setattr(trainer.coordinator, "relieve_pressure", lambda: run.producer()[1]())
    if ends:
        trainer.fit(loader)
        assert acked(run) == set(ALL)
    else:
        with pytest.raises(StoreError, match=rf"'small:5' were lost {FORGOTTEN_MAX + 1} times.*were lost"):
            trainer.fit(loader)
    assert SQLiteMetadataStore(run.db).quarantined() == {}


def test_losses_of_a_cache_do_not_add_up_with_a_damaged_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What replaced a dead producer may answer a read with other bytes, once: no sample is to blame."""

    class Damaging(ForgetfulStore):
        damages = 1

        def get(self, ref: SampleRef) -> dict[str, Any]:
            if ref.sample_id == "small:5" and not self.losses and self.damages:
                self.damages -= 1
                raise FeatureCorruptError("The bytes of small:5 are damaged.")
            return super().get(ref)

    run = SmallRun(tmp_path, features=Damaging(8 << 20, RECAPTURES_MAX))
    run.producer()[1]()
    trainer, loader = run.consumer()
    monkeypatch.setattr(trainer.coordinator, "relieve_pressure", lambda: run.producer()[1]())
    trainer.fit(loader)
    assert SQLiteMetadataStore(run.db).quarantined() == {}
    assert acked(run) == set(ALL)


class BlindStore(InMemoryFeatureStore):
    """From some reading on, no bytes are readable."""

    reads, after = 0, 0

    def get(self, ref: SampleRef) -> dict[str, Any]:
        self.reads += 1
        if self.reads > self.after:
            raise FeatureCorruptError(f"The bytes of {ref.sample_id} are damaged.")
        return super().get(ref)


@pytest.mark.parametrize(("after", "batch_size"), [(0, 3), (3, 3), (4, 3), (9, 3), (10, 3), (4, 1), (9, 1)])
def test_a_trainer_that_can_read_nothing_blames_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, batch_size: int
) -> None:
    """From the first weights on, or in the middle of a step; once it can read, it trains them all."""
    store = BlindStore(8 << 20)
    run = SmallRun(tmp_path, features=store, batch_size=batch_size)
    store.after = after
    run.producer()[1]()
    trainer, loader = run.consumer()
    monkeypatch.setattr(trainer.coordinator, "relieve_pressure", lambda: run.producer()[1]())
    with pytest.raises(StoreError, match="can read no sample"):
        trainer.fit(loader)
    assert SQLiteMetadataStore(run.db).quarantined() == {}
    store.after = 1 << 30
    run.run()
    assert acked(run) == set(ALL)
    assert SQLiteMetadataStore(run.db).quarantined() == {}


def test_the_only_sample_of_a_step_is_quarantined_if_others_could_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SmallRun(tmp_path, features=RottenStore(8 << 20), batch_size=1)
    run.producer()[1]()
    trainer, loader = run.consumer()
    monkeypatch.setattr(trainer.coordinator, "relieve_pressure", lambda: run.producer()[1]())
    trainer.fit(loader)
    assert list(SQLiteMetadataStore(run.db).quarantined()) == ["small:5"]
