"""A run whose states go from the producer to the trainer in float8 (method.transfer)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paceline.engines.engine import Captured, CaptureRequest
from paceline.features.float8 import narrowed, widened
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.methods.eagle3.method import Eagle3Method
from paceline.testing.small_run import SmallRun, same_bits, weights
from paceline.testing.synthetic import SyntheticEngine
from paceline.types import Feature, FeatureSpec, SampleRef

READ, LAST = "aux_hidden_states", "last_hidden_states"


def run_in(folder: Path, transfer: str = "float8", engine: SyntheticEngine | None = None) -> SmallRun:
    settings = {"draft_vocab_size": 32, "ttt_steps": 2, "init": "random", "transfer": transfer}
    run = SmallRun(folder, method=Eagle3Method(settings), passes=2)
    run.engine = engine or run.engine
    return run


def refs(run: SmallRun) -> list[SampleRef]:
    return [entry.ref for entry in SQLiteLedger(run.db).read(0, run.num_prompts).entries]


class RoundingEngine(SyntheticEngine):
    """Its states have the numbers that float8 holds, in float32."""

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        rounded = [replace(feature, narrowed=feature.name == READ) for feature in features]
        samples = super().capture(group, features)
        return [
            replace(one, tensors=widened(narrowed(one.sample_id, one.tensors, rounded))) for one in samples
        ]


class UnsoundEngine(SyntheticEngine):
    """A state of one sample is not finite."""

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        samples = super().capture(group, features)
        for sample in samples:
            if sample.sample_id == "small:5":
                sample.tensors[READ][1, 2] = math.inf
        return samples


def test_the_schema_of_a_sample_says_what_is_in_float8(tmp_path: Path) -> None:
    """The states that the draft reads; tokens, mask and the states of the target's distribution are exact."""
    exact, run = run_in(tmp_path / "exact", "exact"), run_in(tmp_path / "run")
    exact.producer()[1]()
    run.producer()[1]()
    ref = refs(run)[0]
    rows = ref.num_tokens
    assert ref.feature_specs == {
        "input_ids": FeatureSpec("input_ids", (rows + 1,), "int32"),
        "loss_mask": FeatureSpec("loss_mask", (rows + 1,), "uint8"),
        READ: FeatureSpec(READ, (rows, 3 * 16), "float8_e4m3fn"),
        f"{READ}.scales": FeatureSpec(f"{READ}.scales", (rows, 3), "float32"),
        LAST: FeatureSpec(LAST, (6, 16), "float32"),
    }
    whole = run.features.get(ref)
    before = exact.features.get(refs(exact)[0])
    assert all(torch.equal(whole[name], before[name]) for name in ("input_ids", "loss_mask", LAST))
    assert ref.estimated_bytes < 0.55 * refs(exact)[0].estimated_bytes


def test_the_trainer_gets_the_numbers_that_were_stored(tmp_path: Path) -> None:
    """The weights are those of a run whose target rounds its states itself, not those of the exact run."""
    found = weights(run_in(tmp_path / "run").run())
    rounding = weights(run_in(tmp_path / "rounding", "exact", RoundingEngine()).run())
    exact = weights(run_in(tmp_path / "exact", "exact").run())
    assert same_bits(found, rounding)
    assert not same_bits(found, exact)


@pytest.mark.parametrize("steps", [1, 6])
def test_a_run_that_dies_goes_on_to_the_same_weights(tmp_path: Path, steps: int) -> None:
    """The consumer dies in its n-th ack, and the features of a sample are lost and captured again."""
    plain = weights(run_in(tmp_path / "plain").run())
    run = run_in(tmp_path / "killed")
    run.producer()[1]()
    run.die_in_ack(steps)
    last = refs(run)[-1]
    run.features.free([(last.sample_id, last.generation)])
    captured = len(run.engine.captured)
    assert same_bits(weights(run.run()), plain)
    assert run.engine.captured[captured:] == [["small:12", "small:13"]]


def test_a_state_that_is_not_finite_fails_its_prompt_alone(tmp_path: Path) -> None:
    """It is named before anything is rounded; the others are trained."""
    run = run_in(tmp_path, engine=UnsoundEngine())
    run.run()
    ledger = SQLiteLedger(run.db)
    failed = ledger.failed()
    assert list(failed) == [5]
    assert f"not finite, or all zero, for small:5 ({READ})" in str(failed)
    assert ledger.snapshot().samples_trained == run.num_prompts - 1
