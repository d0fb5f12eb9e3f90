"""Variants are trained and measured on features that are captured once, by the product's own producer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from paceline.config.load import load_run_config
from paceline.errors import ConfigError
from paceline.features.stores.files import FileFeatureStore
from paceline.roles import comparer, kept_capture
from paceline.roles.comparer import compare
from paceline.roles.comparison import PREPARED, RESULT, TRAINED, Comparison, Variant, prepared
from paceline.roles.kept_features import Asked
from paceline.roles.plan import plan_run
from paceline.target.head import TargetHead
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun
from paceline.training import replay
from paceline.training.learner import DRAFT

SAME = Variant(name="same", sections={})
DFLASH = {"name": "dflash", "block_size": 3, "layers": 1, "target_states": 3, "dtype": "float32"}
OTHER = Variant(name="other", sections={"method": DFLASH})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("comparer")
    # Two passes over blocks, and a last step that is not full.
    training = {"batch_size": 3, "micro_batch_size": 3, "passes": 2, "ema_decay": 0.9}
    model, method = make_tiny_folder(folder / "model"), {"feature_noise": 0.05, "transfer": "float8"}
    return TinyRun(folder, model, training=training, method=method, evaluation={"max_new_tokens": 8})


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny products are slower on several."""
    monkeypatch.setattr(comparer.os, "sched_getaffinity", lambda _: {0})


@pytest.fixture
def _not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training alone gives the figures."""
    monkeypatch.setattr(comparer._Variant, "measure", lambda self, _: load_json(self._folder / TRAINED))


def load_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def asked(run: TinyRun, name: str, *variants: Variant, **budget: Any) -> Comparison:
    return Comparison(directory=run.folder / name, variants=variants, **budget)


def capture(run: TinyRun, comparison: Comparison) -> dict[str, Any]:
    run.work_here(partial(compare, request=comparison.model_dump_json()))
    return prepared(comparison.directory)


def variant(run: TinyRun, comparison: Comparison, number: int = 0) -> tuple[Path, dict[str, Any]]:
    """The variant's folder and figures."""
    try:
        run.work_here(partial(compare, request=comparison.model_dump_json(), number=number))
    finally:
        torch.use_deterministic_algorithms(False)
    told = prepared(comparison.directory)
    folder = comparison.folder_of(load_run_config(run.run_file), number, told["features"])
    return folder, load_json(folder / RESULT)


@pytest.fixture(scope="module")
def both(run: TinyRun) -> Comparison:
    """A comparison of two methods whose features are captured."""
    comparison = asked(run, "both", SAME, OTHER)
    capture(run, comparison)
    return comparison


def sample_files(comparison: Comparison) -> dict[Path, int]:
    """Every kept sample, and when it was written."""
    return {
        path: path.stat().st_mtime_ns for path in comparison.directory.glob("features-*/samples/*.safet*")
    }


def test_a_variant_that_changes_nothing_gets_the_weights_of_the_run(run: TinyRun, both: Comparison) -> None:
    """Bit for bit, although the features were captured for another method, too."""
    weights = run.train_here()
    folder, found = variant(run, both)
    compared = load_file(folder / DRAFT)
    assert compared.keys() == weights.keys()
    assert all(torch.equal(compared[name], weights[name]) for name in weights)
    assert found["steps"] == 27  # 40 samples, twice, in steps of 3
    assert found["parameters"] == sum(
        tensor.numel() for name, tensor in weights.items() if name not in ("d2t", "t2d")
    )


def test_every_variant_is_measured_by_lossless_decoding_and_simulated(run: TinyRun, both: Comparison) -> None:
    _, found = variant(run, both, 1)
    assert found["method"] == "dflash"
    assert found["evaluation"]["identical"] == found["evaluation"]["prompts"] == 3
    assert 1 <= found["evaluation"]["chain"]["acceptance_length"] <= 3
    assert 1 <= found["simulated_acceptance_length"] <= 3
    assert found["simulated"]["acceptance_length_estimate"] == found["simulated_acceptance_length"]
    assert {"accuracy_0", "accuracy_1", "loss_0", "loss_1"} < set(found["simulated"])


def test_the_features_of_a_second_call_are_those_of_the_first(
    run: TinyRun, both: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No engine is built, even for variants that ask for less."""
    monkeypatch.setattr(kept_capture, "_engine", None)
    before = sample_files(both)
    fewer = asked(run, "both", SAME)
    assert capture(run, fewer)["features"] == capture(run, both)["features"]
    assert sample_files(fewer) == before
    assert len(before) == 40


def tensors_by_sample(files: Iterable[Path]) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name.partition("-")[0]: load(path.read_bytes()) for path in files}


def test_a_torn_file_is_captured_again_to_the_same_bits(run: TinyRun) -> None:
    """Also one whose size is right, and one that is gone; samples of sound files are not written again."""
    comparison = asked(run, "torn", SAME)
    told = capture(run, comparison)
    before = sample_files(comparison)
    content = tensors_by_sample(before)
    cut, flipped, gone = sorted(before)[:3]
    cut.write_bytes(cut.read_bytes()[:-9])
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    gone.unlink()
    assert capture(run, comparison)["samples"] == told["samples"]
    after = sample_files(comparison)
    assert len(set(after.items()) & set(before.items())) == len(before) - 3
    again = tensors_by_sample(after)
    assert again.keys() == content.keys()
    for name, tensors in content.items():
        assert all(torch.equal(again[name][key], tensor) for key, tensor in tensors.items())


def test_a_killed_capture_goes_on(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = asked(run, "killed", SAME)
    put, calls = FileFeatureStore.put, list[str]()

    def killed(store: FileFeatureStore, sample_id: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(sample_id)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return put(store, sample_id, *args, **kwargs)

    monkeypatch.setattr(FileFeatureStore, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        capture(run, comparison)
    assert not (comparison.directory / PREPARED).exists()
    told = capture(run, comparison)
    assert len(told["samples"]) == 40
    assert len(calls) < 40 + 8 + 3  # the group that was killed, and the held-out prompts
    assert told["samples"] == capture(run, asked(run, "both", SAME, OTHER))["samples"]


@pytest.mark.usefixtures("_not_measured")
def test_both_variants_of_a_budget_see_the_same_tokens(run: TinyRun, both: Comparison) -> None:
    """A budget of its own is another result."""
    tokens = prepared(both.directory)["tokens"] // 2
    limited = asked(run, "both", SAME, OTHER, tokens=tokens)
    (one, first), (other, second) = variant(run, limited, 0), variant(run, limited, 1)
    assert tokens <= first["tokens"] == second["tokens"] < 1.2 * tokens
    assert first["steps"] == second["steps"]
    config, features = load_run_config(run.run_file), prepared(both.directory)["features"]
    assert len({one, other, both.folder_of(config, 0, features)}) == 3


@pytest.mark.usefixtures("_not_measured")
def test_a_budget_of_minutes_gives_the_steps_that_fit(
    run: TinyRun, both: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on a second for every look: the learning rate reaches its end within the time."""
    looks = iter(range(10_000))
    monkeypatch.setattr(replay, "monotonic", lambda: float(next(looks)))
    _, found = variant(run, asked(run, "both", SAME, minutes=1.0), 0)
    assert 10 <= found["steps"] <= 60
    assert found["seconds"] >= 30


def test_a_killed_measurement_does_not_train_again(
    run: TinyRun, both: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = variant(run, both)
    (folder / RESULT).unlink()
    monkeypatch.setattr("paceline.roles.comparer.train", None)
    again = variant(run, both)[1]
    assert again["evaluation"]["cycles"] == found["evaluation"]["cycles"]
    assert again["seconds"] == found["seconds"]


def test_a_disk_without_room_is_refused_before_the_capture(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = asked(run, "full", SAME)
    usage = kept_capture.shutil.disk_usage(run.folder)
    monkeypatch.setattr(kept_capture.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"may take .* MB more.*--prompts"):
        capture(run, comparison)
    assert sample_files(comparison) == {}


def test_a_variant_that_does_not_fit_the_target_is_refused_before_the_capture(run: TinyRun) -> None:
    wrong = Variant(name="wrong", sections={"method": {**DFLASH, "target_states": 50}})
    comparison = asked(run, "unfit", SAME, wrong)
    with pytest.raises(ConfigError, match="target_states"):
        capture(run, comparison)
    assert not comparison.directory.exists()


def test_fewer_prompts_are_the_first_ones_in_every_round(run: TinyRun) -> None:
    told = capture(run, asked(run, "few", SAME, prompts=8))
    assert [sample[0].partition(":")[2] for sample in told["samples"]] == [
        f"{round_}/t{n}" for round_ in range(2) for n in range(8)
    ]


def test_of_a_mixture_too_the_first_prompts_are_those_of_a_run(run: TinyRun, tmp_path: Path) -> None:
    """In the run's own order, each in every round; their number is part of what the features are bound to."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"other {n}"}) + "\n" for n in range(9)))
    sources = [{"path": str(run.folder / "train.jsonl")}, {"path": str(other), "weight": 2}]
    mixed = TinyRun(tmp_path, run.folder / "model", data={"sources": sources, "rounds": 2})
    plan, head = plan_run(load_run_config(mixed.run_file)), TargetHead.load(run.folder / "model")
    whole, few = (Asked(plan, size, (), head) for size in (plan.prompts.size, 7))
    order = [prompt.prompt_id.partition("/")[2] for prompt in whole.source.read(0, 7)]
    assert [prompt.prompt_id for prompt in few.source.read(0, 20)] == [
        f"{round_}/{name}" for round_ in range(2) for name in order
    ]
    assert (whole.source.size, few.source.size) == (76, 14)  # one source counts twice
    assert few.identity()["prompts"] != whole.identity()["prompts"]
