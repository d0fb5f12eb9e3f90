"""`paceline fsck` and `paceline inspect` on runs made by hand: what a person reads, and the exit codes."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline import crashpoints
from paceline.cli.main import app
from paceline.ledger.records import Wanted
from paceline.testing.light_run import LightRun, RunShape
from paceline.testing.power_cuts import MainsRun
from paceline.testing.run_by_hand import RunByHand
from paceline.testing.samples import sample_ref

SHAPE = RunShape(prompts=20, group=4, batch=3, passes=2, interval=3)


class CrashError(BaseException):
    """The machine is off."""


def told(*arguments: object, code: int = 0) -> str:
    """What the command prints; it must end with `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run: most of its history archived, two checkpoints kept."""
    run = LightRun(tmp_path_factory.mktemp("finished"), SHAPE)
    run.produce()
    run.consume()
    return run.folder


def head_file(run: RunByHand, name: str) -> Path:
    return run.checkpoints.folder / run.consumer.checkpoints()[-1].name / name


def test_fsck_says_sound_rule_by_rule(finished: Path) -> None:
    """One line for every rule, the counts, the verdict."""
    output = told("fsck", finished)
    lines = output.splitlines()
    assert lines[0].startswith("looked at 20 samples, 14 steps, 2 checkpoints, 14 head step, 16 archived")
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"C{n} ok" for n in (1, 2, 3, 4, 5, 8, 9, 10)]
    assert lines[-1].startswith("sound: no sample is lost")


def test_fsck_names_what_is_wrong_and_what_to_do(by_hand: RunByHand) -> None:
    """A damaged checkpoint alone leaves the ledger sound; a lost commit does not."""
    by_hand.train(by_hand.capture(3))
    by_hand.checkpoint()
    assert "sound: no sample is lost" in told("fsck", by_hand.folder)
    head_file(by_hand, "weights.bin").write_bytes(b"damaged")
    output = told("fsck", by_hand.folder, code=9)
    assert "C5 1 ERRORS: checkpoints on disk are the ones recorded" in output
    assert "weights.bin is damaged" in output
    assert "C1 ok" in output
    assert "UNSOUND: 1 errors" in output
    assert "Restore the checkpoints named above from a backup" in output
    by_hand.ledger._db.execute("DELETE FROM archive")
    output = told("fsck", by_hand.folder, code=9)
    assert "ERROR 3 samples are archived; the archive finishes 0" in output
    assert f"Keep a copy of {by_hand.folder}" in output


def test_fsck_takes_what_nobody_can_open(by_hand: RunByHand, tmp_path: Path) -> None:
    """No run, a run not begun, a ledger of a later version, a file that is none: each says what to do."""
    assert "There is no run in" in told("fsck", tmp_path, code=2)
    ledger = tmp_path / "ledger.db"
    ledger.write_bytes(b"")
    assert "the run has not begun" in told("fsck", tmp_path, code=6)
    by_hand.checkpoint()
    by_hand.ledger._db.execute("PRAGMA user_version = 99")
    assert "schema version 99" in told("fsck", by_hand.folder, code=6)
    by_hand.ledger.close()
    for content in (b"", b"x" * 5000):
        (by_hand.folder / "ledger.db").write_bytes(content)
        output = told("fsck", by_hand.folder, code=9)
        assert "UNSOUND: 1 errors" in output
        assert "C1 ok" not in output


def test_inspect_tells_a_steps_samples_and_a_samples_life(finished: Path) -> None:
    """From the ledger alone, archived history included."""
    first = told("inspect", finished, "--step", 1)
    assert "step 1: durable, 3 samples" in first
    assert "1  light:0  place 0, visit 1; trained, last by step 2, durable; features freed" in first
    assert "light:0  place 0, visit 2 and last" in told("inspect", finished, "--step", 2)
    life = told("inspect", finished, "--sample", "light:0")
    assert "sample light:0 (prompt 0), place 0 in the log" in life
    assert life.count("visited by step") == SHAPE.passes
    assert "durable; features freed" in life
    assert told("inspect", finished, "--sample", "0") == life
    assert "20 samples committed, step 14 acked" in told("inspect", finished)
    assert "Step 15 has no plan" in told("inspect", finished, "--step", 15, code=2)


def test_inspect_tells_what_is_provisional_planned_and_failed(by_hand: RunByHand) -> None:
    """Every way a sample may stand, each with its reason; the unknown is an error that says so."""
    ids = by_hand.capture(6)
    by_hand.train(ids[:1])
    by_hand.checkpoint()
    by_hand.begin(ids[1:3])
    by_hand.consumer.quarantine([ids[2]], step=2, reason="loss is nan")
    by_hand.train(ids[1:2], rev=1)
    by_hand.begin(ids[3:4])
    by_hand.consumer.report_lost(ids[4:5])
    by_hand.producer.lease(2)
    by_hand.producer.fail([6], "task-6: no text", retryable=False)
    run = by_hand.folder

    everything = told("inspect", run)
    assert "6 samples committed, step 2 acked, head step-00000001" in everything
    assert "quarantined run0:s2: loss is nan" in everything
    assert "failed prompt task-6: no text" in everything
    assert "to be captured again run0:s4" in everything
    assert "step 1: durable, 1 samples" in told("inspect", run, "--step", 1)
    second = told("inspect", run, "--step", 2)
    assert "step 2: provisional, plan revision 1, 1 samples" in second
    assert "run0:s1  place 1, visit 1 and last; trained, last by step 2, provisional" in second
    third = told("inspect", run, "--step", 3)
    assert "step 3: planned, 1 samples" in third
    assert "visit 1; not trained to the end yet; features resident" in third
    assert "in quarantine by step 2: loss is nan" in told("inspect", run, "--sample", ids[2])
    assert "features lost, to be captured again" in told("inspect", run, "--sample", ids[4])
    assert "never committed; failed: no text" in told("inspect", run, "--sample", "task-6")
    assert "never committed; failed: no text" in told("inspect", run, "--sample", "run0:task-6")
    assert "nobody" in told("inspect", run, "--sample", "nobody", code=2)


def test_the_checker_loads_nothing_of_what_it_checks() -> None:
    """Not even by way of the package it lies in."""
    code = (
        "import sys, paceline.fsck.checker\n"
        "ours = {name for name in sys.modules if name.startswith('paceline.')}\n"
        "sys.exit(any(not name.startswith('paceline.fsck') for name in ours))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_commands_load_no_torch(finished: Path) -> None:
    """They answer at once, on a machine that has none."""
    code = (
        "import sys\nfrom paceline.cli.main import app\n"
        "for words in (['fsck', sys.argv[1]], ['inspect', sys.argv[1], '--step', '1']):\n"
        "    try:\n        app(words)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(finished)], check=True, capture_output=True)


def test_a_ledger_that_another_program_opened_after_a_crash_goes_on(tmp_path: Path) -> None:
    """One SELECT of plain SQLite empties the log into the database: that is what the log was for."""
    crashed = MainsRun(tmp_path / "crashed", SHAPE, range(300, 301))
    crashed.produce()

    def crash(name: str) -> None:
        crashed.watch(name)
        if crashed.left:
            crashpoints.watch(None)
            raise CrashError

    crashpoints.watch(crash)
    with pytest.raises(CrashError):
        crashed.consume()
    [(_, _, run)] = crashed.left
    shutil.copytree(crashed.feature_folder, run.feature_folder)
    with closing(sqlite3.connect(run.ledger_path)) as browser:
        assert browser.execute("SELECT committed FROM run").fetchone() == (20,)
    run.consume()
    assert "sound: no sample is lost" in told("fsck", run.folder)


def test_inspect_finds_a_prompt_by_its_id_in_the_prompt_file(by_hand: RunByHand) -> None:
    """In every round: trained, failed, or still to come."""
    config = {"training.passes": 1, "prompts.rounds": 3}
    by_hand.ledger.set_facts(None, {"config": config})
    by_hand.producer.lease(3)
    [generation] = by_hand.producer.reserve([Wanted(0, "run0:0/t5", 9)]) or []
    ref = replace(sample_ref(0, ordinal=0), sample_id="run0:0/t5", source_task_id="0/t5")
    by_hand.producer.commit([replace(ref, generation=generation)])
    by_hand.producer.fail([2], "1/t5: odd", retryable=False)
    by_hand.train(["run0:0/t5"])
    lines = told("inspect", by_hand.folder, "--sample", "t5").splitlines()
    assert lines[0] == "sample run0:0/t5 (prompt 0/t5), place 0 in the log"
    assert lines[1].startswith("  visited by step 1")
    assert lines[-2:] == ["prompt 1/t5: never committed; failed: odd", "prompt 2/t5: not captured yet"]
    assert told("inspect", by_hand.folder, "--sample", "0/t5").splitlines() == lines[:-2]
    assert told("inspect", by_hand.folder, "--sample", "run0:0/t5").splitlines() == lines[:-2]
    assert "No sample 't6'" in told("inspect", by_hand.folder, "--sample", "t6", code=2)


def test_step_0_is_the_checkpoint_before_the_first(finished: Path) -> None:
    """It has no plan, and that is no mistake."""
    assert "step 0: the checkpoint of the first weights" in told("inspect", finished, "--step", 0)


def test_fsck_does_not_promise_a_resume_without_a_whole_checkpoint(finished: Path, tmp_path: Path) -> None:
    """While one is left train goes on from it; from none it does not."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    folders = sorted((run / "checkpoints").glob("step-*"))
    assert len(folders) == 2
    shutil.rmtree(folders[1])
    assert "goes on from the newest checkpoint that is whole" in told("fsck", run, code=9)
    shutil.rmtree(folders[0])
    output = told("fsck", run, code=9)
    assert "no checkpoint is whole" in output
    assert "start a new run" in output
    assert "goes on from" not in output


@pytest.mark.parametrize("verb", ["status", "inspect", "fsck", "evaluate"])
def test_a_path_that_is_not_there_is_called_neither(tmp_path: Path, verb: str) -> None:
    """It may have been meant as either."""
    output = told(verb, tmp_path / "gone", code=2)
    assert f"There is no {tmp_path / 'gone'}, neither a run's directory nor a run file" in output
