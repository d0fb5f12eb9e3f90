"""The commands compare and sweep: stages in order, a table that can be trusted, files that are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from paceline.cli import compare as commands
from paceline.cli.compare import COLUMNS, WARNING, compare, sweep
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.durable_files import replace_file
from paceline.errors import ConfigError, RunBusyError, TrainingError
from paceline.ledger.locks import RoleLock
from paceline.roles import comparison_runs
from paceline.roles.child import RoleFailedError
from paceline.roles.comparison import PREPARED, RESULT, Comparison
from paceline.roles.plan import events_path
from paceline.telemetry import EventLog
from paceline.testing.tiny_run import TinyRun


def figures(acceptance: float, speed_up: float) -> dict[str, Any]:
    way = {"acceptance_length": acceptance, "acceptance_rate": [0.5, 0.25], "speed_up": speed_up}
    way |= {"prompts": 3, "identical": 3}
    trained = {"steps": 7, "samples": 9, "tokens": 1234, "seconds": 5.0, "step_ms": 12.34}
    return {
        **trained,
        "method": "eagle3",
        "parameters": 1_500_000,
        "simulated_acceptance_length": 1.5,
        "obstacle": "",
        "evaluation": {**way, "chain": way},
    }


class Processes:
    """Stands in for the processes of the stages: variant k gives `given[k]`, or ends as it says."""

    def __init__(self, given: list[dict[str, Any] | RoleFailedError | None]) -> None:
        self.given, self.stages = given, list[int | None]()

    def __call__(
        self, run_file: Path, config: RunConfig, look: Callable[[], None], request: str, number: str = ""
    ) -> bool:
        comparison = Comparison.model_validate_json(request)
        self.stages.append(int(number) if number else None)
        events = EventLog(events_path(config, "comparer"))
        if not number:
            events.write("note", message="the features take at most 5 MB")
            told = {"features": "features-x", "samples": [["s", 0, 9]], "tokens": 9, "bytes": 5_000_000}
            replace_file(comparison.directory / PREPARED, json.dumps(told).encode())
            return True
        given = self.given[int(number)]
        if isinstance(given, RoleFailedError):
            raise given
        if given is not None:
            folder = comparison.folder_of(config, int(number), "features-x")
            folder.mkdir(parents=True)
            (folder / RESULT).write_text(json.dumps(given))
        return given is not None


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return TinyRun(tmp_path, model)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(width=240, record=True, file=StringIO())
    monkeypatch.setattr(commands, "out", console)
    return console


def variant(run: TinyRun, name: str, rate: float) -> Path:
    path = run.folder / f"{name}.yaml"
    path.write_text(f"training: {{learning_rate: {rate}}}\n")
    return path


def test_variants_are_compared_one_after_the_other(
    run: TinyRun, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features first; then each variant; then one table, with what acceptance alone does not say."""
    processes = Processes([figures(1.25, 1.0), figures(1.75, 0.9)])
    monkeypatch.setattr(comparison_runs, "run_comparer", processes)
    report, markdown = run.folder / "r.json", run.folder / "t.md"
    compare(run.run_file, [variant(run, "fast", 0.1)], tokens=1000, json=report, markdown=markdown)
    assert processes.stages == [None, 0, 1]
    text = screen.export_text()
    assert "note: the features take at most 5 MB" in text
    assert "features: 1 samples, 9 tokens to learn, 5 MB" in text
    assert text.index("1 of 2: run") < text.index("2 of 2: fast")
    assert WARNING in text
    assert "Each variant trained on 1,000 tokens" in text
    told = json.loads(report.read_text())
    assert [each["name"] for each in told["variants"]] == ["run", "fast"]
    assert told["variants"][1]["evaluation"]["acceptance_length"] == 1.75
    assert told["note"] == WARNING
    lines = markdown.read_text().splitlines()
    assert lines[0] == f"| {' | '.join(COLUMNS)} |"
    assert (
        lines[3] == "| fast | 1.75 | 0.50, 0.25 | 0.90 | 1.75 | 0.90 | 1.50 | 1.5 M | 1,234 | 7 | 5 | 12.3 |"
    )
    assert WARNING in lines[-1]


def test_a_comparison_that_was_stopped_goes_on_with_what_is_left(
    run: TinyRun, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes([figures(1.25, 1.0), None])
    monkeypatch.setattr(comparison_runs, "run_comparer", processes)
    fast = variant(run, "fast", 0.1)
    with pytest.raises(typer.Exit) as stopped:
        compare(run.run_file, [fast])
    assert stopped.value.exit_code == 130
    processes.given[1] = figures(1.75, 0.9)
    processes.stages.clear()
    compare(run.run_file, [fast])
    assert processes.stages == [None, 1]
    assert "1 of 2: run (kept)" in screen.export_text()


def test_a_variant_whose_training_fails_leaves_the_others(
    run: TinyRun, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = RoleFailedError("Step 3 has loss nan.", "", "", TrainingError.exit_code)
    processes = Processes([failed, figures(1.75, 0.9)])
    monkeypatch.setattr(comparison_runs, "run_comparer", processes)
    report = run.folder / "r.json"
    compare(run.run_file, [variant(run, "fast", 0.1)], json=report)
    assert "run failed: Step 3 has loss nan." in screen.export_text()
    [first, second] = json.loads(report.read_text())["variants"]
    assert (first["failed"], "evaluation" in first) == ("Step 3 has loss nan.", False)
    assert second["failed"] == ""


def test_answers_that_differ_from_plain_decoding_are_told(
    run: TinyRun, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = figures(1.25, 1.0)
    found["evaluation"]["identical"] = 2
    monkeypatch.setattr(comparison_runs, "run_comparer", Processes([found]))
    compare(run.run_file)
    assert "run gave 1 of 3 answers that differ from plain decoding" in screen.export_text()


def test_another_error_ends_the_comparison(
    run: TinyRun, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RoleFailedError("The disk is full.", "", "", 5)
    monkeypatch.setattr(comparison_runs, "run_comparer", Processes([error]))
    with pytest.raises(RoleFailedError, match="The disk is full"):
        compare(run.run_file)


def test_a_sweep_shows_the_best_first(run: TinyRun, screen: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the metric that is asked for; a variant that failed comes last."""
    failed = RoleFailedError("Step 3 has loss nan.", "", "", TrainingError.exit_code)
    processes = Processes([failed, figures(1.25, 1.5), figures(1.75, 0.9)])
    monkeypatch.setattr(comparison_runs, "run_comparer", processes)
    report, settings = run.folder / "r.json", ["training.learning_rate=0.1,0.2,0.3"]
    sweep(run.run_file, settings, json=report)
    rates = [each["name"] for each in json.loads(report.read_text())["variants"]]
    assert rates == [f"learning_rate={rate}" for rate in (0.3, 0.2, 0.1)]
    sweep(run.run_file, settings, "speed-up", json=report)
    rates = [each["name"] for each in json.loads(report.read_text())["variants"]]
    assert rates == [f"learning_rate={rate}" for rate in (0.2, 0.3, 0.1)]


def test_mistakes_are_told_before_a_process_starts(
    run: TinyRun, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_runs, "run_comparer", None)
    with pytest.raises(ConfigError, match=r"no metric 'speed'.*speed-up"):
        sweep(run.run_file, ["training.passes=1,2"], "speed")
    with pytest.raises(ConfigError, match="there is no folder"):
        compare(run.run_file, json=run.folder / "nowhere" / "r.json")
    with pytest.raises(ConfigError, match="learning_rat"):
        sweep(run.run_file, ["training.learning_rat=1"])
    with pytest.raises(ConfigError, match="choose one"):
        compare(run.run_file, tokens=5, minutes=1.0)


def test_a_second_comparison_in_the_same_place_is_refused(
    run: TinyRun, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_runs, "run_comparer", Processes([]))
    directory = load_run_config(run.run_file).run.directory / "comparison"
    lock = RoleLock(directory, "comparison")
    try:
        with pytest.raises(RunBusyError):
            compare(run.run_file)
    finally:
        lock.release()
