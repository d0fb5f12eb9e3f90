"""`paceline compare` of runs: what differs, what was measured alike, what it cost; nothing is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.evaluation.curve import Point, record_point
from paceline.ledger.facts import CONFIG, RUN_ID
from paceline.roles.target_binding import MODEL, TOKENIZER
from paceline.telemetry import EventLog
from paceline.testing.run_by_hand import RunByHand

ODD = "[red]\x1b[2Jrun"


def made(
    folder: Path, name: str, rate: float, length: float, conditions: str = "c", target: str = "t"
) -> Path:
    run = RunByHand(folder)
    run.ledger.set_facts(None, {MODEL: target, TOKENIZER: "t"})
    settings = {"run.name": name, "run.directory": str(folder), "training.learning_rate": rate}
    run.ledger.set_facts(None, {RUN_ID: name, CONFIG: {**settings, "training.batch_size": 4}})
    log = EventLog(folder / "events" / "consumer.jsonl")
    log.write("role_started", pid=3)
    for step in (1, 2):
        log.write("step", step=step, loss=4 - rate * step)
    log.write("role_ended", stopped=False)
    log.close()
    figures = {"prompts": 9, "num_draft_tokens": 3, "branching": 1, "emitted_per_cycle": 1.4}
    chain = {
        **figures,
        "acceptance_length": length,
        "acceptance_rate": [0.4],
        "acceptance_length_interval": [1.2, 1.9],
    }
    record_point(folder, Point(2, "", "step-2", "m", "d", conditions, {**chain, "chain": chain}, 2))
    run.ledger.close()
    return folder


def told(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    """Settings that differ and no others, both curves, both lengths with intervals, both costs."""
    one, two = made(tmp_path / "one", "slow", 0.1, 1.5), made(tmp_path / "two", ODD, 0.5, 1.6)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    files = (tmp_path.parent / f"{tmp_path.name}.json", tmp_path.parent / f"{tmp_path.name}.md")
    shown = told(one, two, "--json", files[0], "--markdown", files[1])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "training.learning_rate 0.1 0.5" in lines
    assert not any("batch_size" in line or "run.directory" in line for line in lines)
    assert "loss 2 3.800 3.000" in lines
    assert any(line.startswith("slow, step 2 chain of 3 1.500 [1.200, 1.900]") for line in lines)
    assert "slow consumer 1 0 0 s" in lines
    assert "\x1b" not in shown
    assert "[red]\\x1b[2Jrun, step 2" in shown
    document: dict[str, Any] = json.loads(files[0].read_text())
    assert document["settings"] == {"training.learning_rate": [0.1, 0.5]}
    assert document["comparable"] is True
    assert [run["measured"][0]["ways"][0]["acceptance_length"] for run in document["runs"]] == [1.5, 1.6]
    assert "| loss | 2 | 3.800 | 3.000 |" in files[1].read_text()
    for file in files:
        file.unlink()


def test_figures_of_other_conditions_are_not_compared_in_silence(tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", "a", 0.1, 1.5), made(tmp_path / "two", "a", 0.1, 1.6, "other prompts")
    shown = told(one, two)
    assert "NOT COMPARABLE" in shown
    assert f"a ({two})" in " ".join(shown.split()), "runs of one name are told apart by their folders"
    assert "Every setting is the same" in shown


def test_figures_of_another_target_are_not_compared_in_silence(tmp_path: Path) -> None:
    """It may have the same name, and the same tokenizer, so that the prompts are the same tokens."""
    one, two = made(tmp_path / "one", "a", 0.1, 1.5), made(tmp_path / "two", "b", 0.1, 1.6, target="another")
    assert "NOT COMPARABLE" in told(one, two)


@pytest.mark.parametrize(
    ("options", "words"),
    [((), "none to compare it with"), (("--tokens", "5"), "variants that are still to be trained")],
)
def test_what_makes_no_sense_for_runs_is_refused(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    run = made(tmp_path / "one", "a", 0.1, 1.5)
    others = (run,) if options else ()
    assert words in told(run, *others, *options, code=2)
