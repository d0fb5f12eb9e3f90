"""A short measurement of a run's roles, which the plan then reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline.cli.main import app
from paceline.config.load import load_run_config
from paceline.errors import ConfigError
from paceline.roles import bench as module
from paceline.roles.bench import BenchRequest, Measured
from paceline.roles.bencher import bench
from paceline.roles.cost_plan import cost_plan
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


def run_of(model: Path, tmp_path: Path, **sections: Any) -> TinyRun:
    (memory := tmp_path / "memory").mkdir()
    return TinyRun(tmp_path / "run", model, features={"directory": str(memory), "budget_mib": 8}, **sections)


@pytest.mark.parametrize("method", ["eagle3", "dflash"])
def test_both_sides_and_the_store_are_timed_on_the_runs_own_prompts(
    model: Path, tmp_path: Path, method: str
) -> None:
    """With the run's method; nothing of the run is written, and nothing stays behind."""
    chosen = {"eagle3": {"name": "eagle3"}, "dflash": {"name": "dflash", "target_states": 3}}[method]
    run = run_of(model, tmp_path)
    kept = {"first_samples": 8, "dtype": "float32"}
    run.config["method"] = {**kept, **chosen, **({"draft_vocab_size": 48} if method == "eagle3" else {})}
    run.write()
    found = bench(BenchRequest(run_file=str(run.run_file), seconds=1.0))
    assert found.dtype == "float32"
    assert found.samples >= 8
    assert min(found.capture_tokens_per_s, found.train_tokens_per_s, found.store_mib_per_s) > 0
    assert not run.directory.exists()
    assert list((tmp_path / "memory").iterdir()) == []


def test_the_plan_reads_what_the_command_has_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(model, tmp_path)
    told = Measured(
        dtype="float32",
        start_s=3.0,
        samples=64,
        capture_tokens_per_s=6.0,
        train_tokens_per_s=100.0,
        store_mib_per_s=900.0,
    )
    monkeypatch.setattr(module, "ask", lambda *_, **__: told.model_dump_json())
    assert (app(["bench", str(run.run_file)], standalone_mode=False) or 0) == 0
    text = capsys.readouterr().out
    assert "capture  6 tokens/s by one producer" in text
    assert f"paceline plan {run.run_file}" in text
    time = cost_plan(load_run_config(run.run_file)).time
    assert (time.capture_s, time.train_tokens_per_s) == (80.0, 100.0)
    assert time.source.startswith("paceline bench on ")


def test_data_that_cannot_be_captured_is_refused(model: Path, tmp_path: Path) -> None:
    run = run_of(model, tmp_path, prompts={"max_prompt_tokens": 1})
    with pytest.raises(ConfigError, match="No prompt of"):
        bench(BenchRequest(run_file=str(run.run_file), seconds=1.0))
