"""A run's report: from what lies beside the run, of this run alone, whatever a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from paceline.cli import export
from paceline.cli.export import report_file
from paceline.evaluation.curve import Point, record_point
from paceline.fsck.checker import check
from paceline.ledger.facts import RENDERING_DATE
from paceline.monitoring.reporting import read_report
from paceline.roles.export_request import read_run_report
from paceline.run_report.document import RunReport
from paceline.telemetry import EventLog
from paceline.testing.run_by_hand import RunByHand

COUNTS = {"prompts": 3, "num_draft_tokens": 3, "branching": 1, "emitted_per_cycle": 1.4}
CHAIN = {**COUNTS, "acceptance_length": 1.5, "acceptance_rate": [0.4, 0.1], "identical": 3}
SPEEDS = {"plain_tokens_per_s": 10.0, "speculative_tokens_per_s": 13.0, "speed_up": 1.3}


def measured(folder: Path, step: int, **more: Any) -> None:
    report = {**CHAIN, "chain": CHAIN, **more}
    record_point(folder, Point(step, "day", f"step-{step}", "m", "d", "c", report, 4))


def made(folder: Path) -> Path:
    run = RunByHand(folder)
    run.train(run.capture(2))
    run.checkpoint()
    run.ledger.set_facts(None, {RENDERING_DATE: "day"})
    run.ledger.close()
    log = EventLog(folder / "events" / "consumer.jsonl")
    log.write("role_started", pid=7)
    log.write("step", step=1, loss=2.5)
    log.close()
    return folder


def test_the_document_tells_what_the_run_was_measured_and_checked(tmp_path: Path) -> None:
    """And the same after a way through JSON, as the exporter gets it."""
    folder = made(tmp_path)
    measured(
        folder, 1, prompts_file="/data/held.jsonl", chain={**CHAIN, "acceptance_length_interval": [1.4, 1.6]}
    )
    report = read_report(folder, check(folder))
    assert (report.steps, report.losses, report.samples["trained"]) == (1, ((1, 2.5),), 2)
    [one] = report.measured
    assert (one.step, one.prompts_file) == (1, "held.jsonl")
    assert one.ways[0].acceptance_length_interval == (1.4, 1.6)
    assert one.ways[0].speed_up is None
    assert report.check.sound
    assert [(role.role, role.starts, role.killed) for role in report.cost] == [("consumer", 1, 1)]
    assert msgspec.json.decode(msgspec.json.encode(report), type=RunReport) == report


def test_the_full_measurement_of_a_step_comes_before_that_beside_training(tmp_path: Path) -> None:
    """If it is this run's: a file of a run that lay here before is left out."""
    folder = made(tmp_path)
    measured(folder, 1)
    full = {**CHAIN, **SPEEDS, "checkpoint_step": 1}
    for began, speed_up in (("day", 1.3), ("another day", None)):
        text = json.dumps({**full, "chain": full, "began": began})
        (folder / "evaluation.json").write_text(text)
        [one] = read_report(folder, "not asked").measured
        assert one.ways[0].speed_up == speed_up


def test_a_run_that_cannot_be_checked_says_so(tmp_path: Path) -> None:
    report = read_report(made(tmp_path), "it is another user's")
    assert (report.check.sound, report.check.why) == (None, "it is another user's")


def test_odd_figures_in_a_file_are_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path)
    odd = {**CHAIN, **SPEEDS, "acceptance_rate": ["x", None, 0.5], "acceptance_length_interval": "no"}
    (folder / "evaluation.json").write_text(json.dumps({**odd, "chain": odd, "checkpoint_step": 1}))
    [one] = read_report(folder, "").measured
    assert one.ways[0].acceptance_rate == (0.5,)
    assert one.ways[0].acceptance_length_interval is None


def of(folder: Path) -> Any:
    places = SimpleNamespace(directory=folder), SimpleNamespace(directory=folder / "mounted")
    return SimpleNamespace(run=places[0], features=places[1])


def test_the_exporter_is_told_figures_and_no_paths(tmp_path: Path) -> None:
    """Its card goes to others; the checker's findings go along."""
    folder = made(tmp_path / "run")
    measured(folder, 1)
    file = report_file(of(folder))
    told = read_run_report(file)
    assert told.check.sound
    assert [one.step for one in told.measured] == [1]
    assert [one.role for one in told.cost] == ["consumer"]
    assert str(tmp_path) not in file.read_text()


def test_a_card_names_no_file_that_could_not_be_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checker looks for shared features where this host has them."""
    folder, asked = made(tmp_path / "run"), list[Path]()

    def refuse(*where: Path) -> None:
        asked.extend(where)
        raise PermissionError(13, "Permission denied", str(folder / "checkpoints"))

    monkeypatch.setattr(export, "checked", refuse)
    file = report_file(of(folder))
    told = read_run_report(file)
    assert asked == [folder, folder / "mounted"]
    assert told.check.sound is None
    assert "paceline fsck" in told.check.why
    assert str(tmp_path) not in file.read_text()
