"""`paceline runs`: every run below a folder, also those that cannot be read; and completion of verbs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.ledger.facts import COMPLETED_STEP, FEATURES_LIE
from paceline.ledger.locks import RoleLock
from paceline.testing.run_by_hand import RunByHand


def made(folder: Path, **facts: object) -> Path:
    run = RunByHand(folder)
    run.train(run.capture(2))
    run.checkpoint()
    run.ledger.set_facts(None, facts)
    run.ledger.close()
    return folder


def told(*arguments: object) -> str:
    command = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.output


def test_every_run_below_a_folder_is_listed(tmp_path: Path) -> None:
    """With its state, how far it is, and what it takes of memory and disk."""
    features = tmp_path / "features"
    features.mkdir()
    (features / "slots").write_bytes(b"x" * (2 << 20))
    made(tmp_path / "runs" / "one", **{COMPLETED_STEP: 1})
    live = made(tmp_path / "runs" / "more" / "two", **{FEATURES_LIE: {"folder": str(features)}})
    (tmp_path / "runs" / "more" / "checkpoints").mkdir()
    lock = RoleLock(live, "consumer")
    lines = told("runs", tmp_path).splitlines()
    rows = {line.split()[-1]: line for line in lines[1:-1]}
    assert rows.keys() == {"runs/one", "runs/more/two"}
    assert " complete " in rows["runs/one"]
    assert " live " in rows["runs/more/two"]
    assert " 2.0 MiB " in rows["runs/more/two"]
    assert lines[-1].startswith("2 runs, 1 live; 2.0 MiB of memory, ")
    lock.release()


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    """It is listed as unreadable, with the reason."""
    made(tmp_path / "a")
    broken = made(tmp_path / "b")
    (broken / "ledger.db").write_bytes(b"no database" * 1000)
    output = told("runs", tmp_path)
    assert "unreadable" in output
    assert f"{broken}: " in output
    assert output.splitlines()[-1].startswith("2 runs, 0 live")
    found = json.loads(told("runs", tmp_path, "--json"))
    assert [one["status"] is None for one in found] == [False, True]
    assert found[1]["problem"]


def test_what_lies_inside_a_run_and_behind_links_is_not_listed(tmp_path: Path) -> None:
    """Copies in a run's folder are its own, and a loop of links never ends."""
    run = made(tmp_path / "run")
    made(run / "backup")
    (tmp_path / "again").symlink_to(run)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert told("runs", tmp_path).splitlines()[-1].startswith("1 run, ")


def test_a_folder_without_a_run_says_how_one_begins(tmp_path: Path) -> None:
    """And one that is not there is an error."""
    assert "holds no run. One begins with: paceline train" in told("runs", tmp_path)
    result = CliRunner().invoke(app, ["runs", str(tmp_path / "gone")])
    assert result.exit_code == 2
    assert "cannot be listed" in result.output


def test_a_shell_completes_the_verbs() -> None:
    """`paceline --install-completion` has bash ask like this."""
    asked = {"_PACELINE_COMPLETE": "complete_bash", "COMP_WORDS": "paceline wat", "COMP_CWORD": "1"}
    script = "import sys; sys.argv[0] = 'paceline'; from paceline.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.split() == ["watch"]
