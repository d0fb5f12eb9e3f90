"""`paceline evaluate`: its options become a request, and a mistake is an error before anything is loaded."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cli.evaluate import MeasuringProgress, evaluation_request, verdict
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.roles.plan import events_path
from paceline.telemetry import EventLog
from paceline.testing.tiny_run import TinyRun


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    run = TinyRun(tmp_path, tmp_path / "model")
    run.directory.mkdir()
    return load_run_config(run.run_file)


def test_without_options_the_held_out_prompts_are_measured_as_after_training(config: RunConfig) -> None:
    assert evaluation_request(config, [], [], None, None, None) is None


def test_any_option_asks_for_a_report_of_its_own(config: RunConfig) -> None:
    """Temperatures may stand in one option; without a suite, the held-out prompts are measured."""
    request = evaluation_request(config, [], ["0,1", "0.5"], 4, 3, None)
    assert request is not None
    assert (request.suites, request.temperatures) == (("heldout",), (0.0, 1.0, 0.5))
    assert (request.max_prompts, request.step) == (4, 3)
    assert request.report == config.run.directory / "evaluation-suites.json"


@pytest.mark.parametrize(
    ("suites", "temperatures", "report", "message"),
    [
        (["humanevl"], [], None, "did you mean 'humaneval'"),
        ([], ["warm"], None, "temperatures"),
        ([], ["3"], None, "less than or equal to 2"),
        ([], [], "no/such/folder/report.json", "there is no folder"),
        ([], [], "report.txt", "does not end in .json"),
    ],
)
def test_a_mistake_is_refused_with_advice(
    config: RunConfig, suites: list[str], temperatures: list[str], report: str | None, message: str
) -> None:
    path = None if report is None else config.run.directory / report
    with pytest.raises(ConfigError, match=message) as raised:
        evaluation_request(config, suites, temperatures, None, None, path)
    assert raised.value.next


@pytest.mark.parametrize(
    ("gain", "interval", "words"),
    [
        (0.3, [0.1, 0.5], "the draft's tree beats prompt lookup (by +0.30 [+0.10, +0.50]"),
        (0.3, [-0.1, 0.5], "is not shown to beat prompt lookup"),
        (0.3, None, "is not shown to beat prompt lookup"),
        (-0.3, [-0.5, -0.1], "DOES NOT BEAT prompt lookup"),
        (-0.1, [-0.5, 0.1], "DOES NOT BEAT prompt lookup"),
    ],
)
def test_the_screen_says_plainly_whether_the_draft_beats_the_lookup(
    gain: float, interval: list[float] | None, words: str
) -> None:
    told = {"gain": gain, "gain_interval": interval, "speed_ratio": 1.5, "speed_ratio_interval": None}
    assert words in verdict("heldout", "tree", told)
    assert "it is 1.50 times as fast" in verdict("heldout", "tree", told)
    assert "it is SLOWER, 0.90 times as fast" in verdict("heldout", "tree", {**told, "speed_ratio": 0.9})


def test_progress_is_told_at_intervals_and_only_of_this_evaluation(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation takes minutes; what an earlier one has told is not its progress."""
    events = EventLog(events_path(config, "evaluator"))
    monkeypatch.setattr("paceline.telemetry.time.time", lambda: 1.0)
    events.write("measured", prompts=9, of=9, what="an earlier one")
    monkeypatch.undo()
    monkeypatch.setattr("paceline.cli.evaluate.TELL_EVERY_S", 0.0)
    console = Console(file=StringIO(), width=100)
    progress = MeasuringProgress(console, config)
    progress.look()
    assert console.file.getvalue() == ""
    events.write("measured", prompts=3, of=10, what="heldout, temperature 0")
    progress.look()
    progress.look()  # nothing new
    assert console.file.getvalue() == "measured 3 of 10 prompts: heldout, temperature 0\n"
