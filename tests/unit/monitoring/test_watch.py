"""`paceline watch` begins before the run, survives what happens to it, ends after it, and changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console
from typer.testing import CliRunner

from paceline.cli import watch as watching
from paceline.cli.main import app
from paceline.cli.screen import line, screen
from paceline.ledger.facts import COMPLETED_STEP
from paceline.ledger.locks import RoleLock
from paceline.monitoring.looking import EVALUATOR_S, LINGER_S, RunLooks
from paceline.monitoring.schema import Evaluation, Measured, Process, RunStatus, Step, Waiting
from paceline.monitoring.status import read_status
from paceline.testing.run_by_hand import RunByHand


def begun(folder: Path, *, is_complete: bool = False) -> RunByHand:
    run = RunByHand(folder)
    run.train(run.capture(2))
    run.checkpoint()
    if is_complete:
        run.ledger.set_facts(None, {COMPLETED_STEP: 1})
    return run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def looking(folder: Path) -> tuple[RunLooks, Clock]:
    clock = Clock()
    return RunLooks(lambda: folder if folder.exists() else None, clock), clock


# -- the looks -----------------------------------------------------------------------------


def test_a_run_may_begin_after_its_watcher(tmp_path: Path) -> None:
    """Neither the folder nor the ledger need be there."""
    looks, _ = looking(tmp_path / "run")
    assert looks.look().problem == "waiting for the run to begin"
    (tmp_path / "run").mkdir()
    assert looks.look().problem.endswith(f"begin in {tmp_path / 'run'}")
    run = begun(tmp_path / "run")
    look = looks.look()
    assert (look.problem, look.is_over) == ("", False)
    assert look.status is not None
    assert look.status.samples.trained == 2
    run.ledger.close()


def test_a_ledger_that_is_away_leaves_the_last_figures_and_is_tried_again(tmp_path: Path) -> None:
    """A server, a disk or a permission may be away for a while."""
    run = begun(tmp_path / "run")
    run.ledger.close()
    looks, _ = looking(run.folder)
    before, ledger = looks.look().status, run.folder / "ledger.db"
    ledger.rename(tmp_path / "aside")
    ledger.mkdir()
    away = looks.look()
    assert away.status == before
    assert away.problem.startswith("it cannot be read now: ")
    assert not away.is_over
    ledger.rmdir()
    (tmp_path / "aside").rename(ledger)
    assert looks.look().problem == ""


def test_a_watch_ends_with_the_run(tmp_path: Path) -> None:
    """Not between two processes of it: only if nothing lives and nothing moves for some seconds."""
    run = begun(tmp_path / "run")
    looks, clock = looking(run.folder)
    lock = RoleLock(run.folder, "consumer")
    clock.now = 100.0
    assert not looks.look().is_over
    lock.release()
    clock.now += LINGER_S - 1
    assert not looks.look().is_over
    run.ledger.set_facts(None, {"moved": True})  # a process of another host is at work
    clock.now += LINGER_S - 1
    assert not looks.look().is_over
    clock.now += LINGER_S
    assert looks.look().is_over
    run.ledger.close()


def test_a_finished_run_is_shown_once(tmp_path: Path) -> None:
    """Its last figures, and what to do next."""
    run = begun(tmp_path / "run", is_complete=True)
    run.ledger.close()
    result = CliRunner().invoke(app, ["watch", str(run.folder)])
    assert result.exit_code == 0, result.output
    first, last = result.output.splitlines()
    assert first.startswith("complete | captured 2 | step 1")
    assert last == f"The run is complete: paceline export {run.folder} --to vllm DIR"


def test_a_stopped_run_is_left_with_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time in which another of its processes would have come."""
    run, clock = begun(tmp_path / "run"), Clock()
    run.ledger.close()

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(watching, "RunLooks", lambda find: RunLooks(find, clock))
    monkeypatch.setattr(watching.time, "sleep", sleep)
    result = CliRunner().invoke(app, ["watch", str(run.folder)])
    assert result.output.splitlines()[-1].endswith("Go on with: paceline train RUN.yaml")
    assert clock.now >= LINGER_S


def test_the_evaluation_after_training_belongs_to_the_run(tmp_path: Path) -> None:
    """Its process takes a while to start."""
    run = begun(tmp_path / "run")
    looks, clock = looking(run.folder)
    looks.look()
    run.ledger.set_facts(None, {COMPLETED_STEP: 1})
    clock.now += LINGER_S
    looks.look()
    clock.now += EVALUATOR_S - 1
    assert not looks.look().is_over
    clock.now += 1
    assert looks.look().is_over
    run.ledger.close()


def test_a_watch_ends_with_its_reader(tmp_path: Path) -> None:
    """`paceline watch RUN | head -1` does not stay behind."""
    run = begun(tmp_path / "run")
    lock = RoleLock(run.folder, "consumer")
    script = f"{sys.executable} -m paceline.cli.main watch --every 0.1 {run.folder} | head -1"
    assert subprocess.check_output(["/bin/sh", "-c", script], text=True).startswith("live | captured 2")
    lock.release()
    run.ledger.close()


def test_ctrl_c_ends_the_view_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal it says so."""

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    run, console = begun(tmp_path / "run"), Console(force_terminal=True, width=80)
    monkeypatch.setattr(watching.time, "sleep", interrupted)
    with console.capture() as shown:
        watching._watch_live(console, looking(run.folder)[0], 1.0)
    assert "Ctrl-C ends this view" in shown.get()
    assert shown.get().endswith("The run was not touched.\n")
    run.ledger.close()


def test_a_run_file_that_is_none_is_an_error_at_once(tmp_path: Path) -> None:
    """Waiting would not mend it."""
    run_file = tmp_path / "run.yaml"
    run_file.write_text("run: [")
    result = CliRunner().invoke(app, ["watch", str(run_file)])
    assert result.exit_code == 2
    assert "error" in result.output


# -- the screen ----------------------------------------------------------------------------


@pytest.fixture
def status(tmp_path: Path) -> RunStatus:
    """Of a run that captures slowly, and has seen everything."""
    run = begun(tmp_path / "run")
    run.ledger.close()
    words = "the trainer waits 38 % of the time for samples: add a producer (paceline produce RUN --join)"
    points = tuple(Measured(step=step, acceptance_length=1 + step / 10) for step in (1, 2, 3))
    return replace(
        read_status(run.folder),
        run="my [bold]run[/INST] :a:",
        state="live",
        seconds_left=4000.0,
        step=Step(number=3, planned=12, loss=2.5, losses=(4.0, 3.0, 2.5), acceptance_length=1.7),
        processes=(
            Process(
                role="producer", state="live", pid=7, doing="captures", waiting_share=0.0, idle_share=0.2
            ),
            Process(role="producer-1", state="elsewhere", pid=8, host="h\x1b[2J", doing="holds no prompts"),
            Process(role="consumer", state="live", pid=9, doing="waits for samples", waiting_share=0.38),
        ),
        waiting=Waiting(consumer_share=0.38, limits="capture", words=words),
        evaluation=Evaluation(curve=points, best=points[1]),
        quarantined={"r/3": "the loss is not a number"},
        restarts=2,
    )


def drawn(status: RunStatus, width: int, **console: Any) -> str:
    on = Console(width=width, force_terminal=True, color_system=None, **console)
    with on.capture() as shown:
        on.print(screen(on, status, hint=watching.HINT))
    return shown.get()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_screen_fits_and_says_who_waits(status: RunStatus, width: int) -> None:
    """Also in a narrow window."""
    text = drawn(status, width)
    assert all(len(row) <= width for row in text.splitlines())
    joined = " ".join(text.split())
    assert "the trainer waits 38 % of the time for samples: add a producer" in joined
    for part in ("step 3 of 12", "1.30 at step 3", "best 1.20 at step 2", "2 restarts", "about 67 min left"):
        assert part in joined, joined
    assert width < 80 or "38 % for samples" in joined


def test_foreign_text_is_shown_and_not_obeyed(status: RunStatus) -> None:
    """Names of runs and hosts are other people's."""
    text = drawn(status, 120)
    assert "my [bold]run[/INST] :a:" in text
    assert "\x1b" not in text
    assert "h\\x1b[2J" in text


def test_a_terminal_without_unicode_gets_ascii(status: RunStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars and curves, too."""
    monkeypatch.setattr(Console, "encoding", "ascii")
    text = drawn(status, 80)
    assert text.isascii()
    assert "####" in text


def test_a_line_of_a_log_has_the_same_figures(status: RunStatus) -> None:
    """And stays one line."""
    text = line(status)
    assert "step 3 of 12: loss 2.500, estimated acceptance length 1.70 | " in text
    assert "acceptance length 1.30 at step 3 | best 1.20 at step 2 | restarts 2 | about 67 min" in text
    assert text.endswith(status.waiting.words)


def test_a_line_says_what_takes_long_before_the_first_step(status: RunStatus) -> None:
    """The first weights of a large target take minutes, in which no number changes."""
    consumer = Process(role="consumer", state="live", doing="makes the first weights")
    before = replace(status.step, number=0, loss=None)
    assert "step 0 of 12 | " in line(replace(status, step=before))
    text = line(replace(status, step=before, processes=(consumer,)))
    assert "step 0 of 12: the trainer makes the first weights | " in text


def test_many_producers_push_nothing_out_of_the_window(status: RunStatus) -> None:
    """And a long reason takes no screen of its own."""
    crowd = tuple(Process(role=f"producer-{number}", state="live") for number in range(40))
    text = drawn(replace(status, processes=(*crowd, *status.processes), quarantined={"r/3": "x" * 9000}), 80)
    assert "and 31 more" in text
    assert len(text.splitlines()) < 45
