"""A command that Ray placed: started again when that helps, and never for ever. No Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.config.load import given_sections, load_run_config
from paceline.errors import CheckpointError, ConfigError, FencedError, RunBusyError
from paceline.placement.keeper import GOING_ON, Keeper, Order, Running, begin
from paceline.placement.rules import BUSY_MAX, INTERRUPTED, Ends, Verdict
from paceline.testing.tiny_run import TinyRun


def judged(code: int, *, trains: bool = True, stopping: bool = False) -> Verdict:
    return Ends(most=2).judge(code, trains=trains, progress=None, stopping=stopping)


@pytest.mark.parametrize("code", [ConfigError.exit_code, CheckpointError.exit_code, 1, FencedError.exit_code])
def test_a_run_that_ends_with_an_error_is_not_started_again(code: int) -> None:
    assert judged(code) is Verdict.FAILED


def test_a_producer_that_was_taken_for_dead_joins_again() -> None:
    assert judged(FencedError.exit_code, trains=False) is Verdict.AGAIN
    assert judged(ConfigError.exit_code, trains=False) is Verdict.FAILED


def test_an_end_in_good_order_is_an_end() -> None:
    assert judged(0) is Verdict.DONE
    assert judged(INTERRUPTED) is Verdict.STOPPED
    assert judged(-signal.SIGKILL, stopping=True) is Verdict.STOPPED


def test_deaths_are_counted_until_the_run_makes_progress() -> None:
    ends = Ends(most=2)

    def killed(progress: int) -> Verdict:
        return ends.judge(-signal.SIGKILL, trains=True, progress=progress, stopping=False)

    assert [killed(0), killed(0), killed(1), killed(1), killed(1)] == [*[Verdict.AGAIN] * 4, Verdict.FAILED]


def test_a_command_waits_for_the_one_that_died_and_not_for_ever() -> None:
    """A process that outlives its node for a moment still holds the run."""
    ends = Ends(most=0)
    said = [
        ends.judge(RunBusyError.exit_code, trains=True, progress=None, stopping=False)
        for _ in range(BUSY_MAX + 1)
    ]
    assert said == [*[Verdict.AGAIN] * BUSY_MAX, Verdict.FAILED]


class Kept:
    """A keeper whose commands are scripts, one after the other."""

    def __init__(self, folder: Path, *scripts: str) -> None:
        run = TinyRun(folder, folder, machine={"restarts_max": 2})
        self.scripts = list(scripts)
        self.has_started = threading.Event()
        self.started: list[subprocess.Popen[bytes]] = []
        config = load_run_config(run.run_file)
        path = folder / "placed" / "trainer.yaml"
        order = Order("the trainer", "train", given_sections(config), str(path), str(folder))
        self.keeper = Keeper(order, begin=self.begin, pause_s=0.0)

    def begin(self, order: Order, tell: Callable[[str], None]) -> Running:
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        process = subprocess.Popen([sys.executable, "-Sc", script], stdout=subprocess.PIPE)
        self.started.append(process)
        self.has_started.set()
        return process

    def run(self) -> None:
        self.keeper.run()
        for process in self.started:
            process.communicate()


KILL = "import os; os.kill(os.getpid(), 9)"
WAIT = "import signal, sys; signal.signal(15, lambda *_: sys.exit(130)); print(flush=True); signal.pause()"


def test_a_killed_command_is_started_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path, KILL, "")
    kept.run()
    told = kept.keeper.look(0)
    assert (told["state"], told["code"], len(kept.started)) == (Verdict.DONE.value, 0, 2)
    assert told["lines"] == ["the trainer ended (-9); it is started again"]
    assert load_run_config(tmp_path / "placed" / "trainer.yaml").run.directory == tmp_path / "run"


def test_what_is_killed_at_every_start_fails_with_advice(tmp_path: Path) -> None:
    kept = Kept(tmp_path, KILL)
    kept.run()
    told = kept.keeper.look(0)
    assert (told["state"], len(kept.started)) == (Verdict.FAILED.value, 3)
    assert "ended 3 times by SIGKILL" in told["error"][0]


def test_a_stop_reaches_the_command_and_nothing_is_started_after_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path, WAIT)
    thread = threading.Thread(target=kept.run)
    thread.start()
    kept.has_started.wait()
    stdout = kept.started[0].stdout
    assert stdout is not None
    stdout.readline()  # it hears signals from here on
    assert kept.keeper.look(0)["state"] == GOING_ON
    kept.keeper.stop()
    thread.join()
    assert (kept.keeper.look(0)["state"], len(kept.started)) == (Verdict.STOPPED.value, 1)


def test_a_stop_before_the_start_starts_nothing(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "")
    kept.keeper.stop()
    kept.run()
    assert (kept.keeper.look(0)["state"], kept.started) == (Verdict.STOPPED.value, [])


def test_a_folder_that_cannot_be_written_fails_with_its_name(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "")
    (tmp_path / "placed").write_text("")
    kept.run()
    told = kept.keeper.look(0)
    assert told["state"] == Verdict.FAILED.value
    assert str(tmp_path / "placed") in told["error"][0]


def test_lines_are_told_once_each_in_order(tmp_path: Path) -> None:
    keeper = Kept(tmp_path, "").keeper
    keeper.tell("one")
    first = keeper.look(0)
    keeper.tell("two")
    assert (first["lines"], keeper.look(first["told"])["lines"]) == (["one"], ["two"])
    assert keeper.look(2)["lines"] == []


def test_ray_is_imported_by_nothing_else() -> None:
    """Neither by the package nor by the commands: it is an extra, and takes a second to import."""
    names = "paceline.cli.main, paceline.cli.train_on, paceline.placement.driver, paceline.cli.verbs.running"
    script = f"import sys, {names}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=dict(os.environ), check=False).returncode == 0


def test_a_command_has_nothing_of_rays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its token, nor what would make a server of the run's join the cluster."""
    seen: dict[str, str] = {}

    def started(*_: object, env: dict[str, str], **__: object) -> object:
        seen.update(env)
        raise OSError("not here")

    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(OSError, match="not here"):
        begin(Kept(tmp_path, "").keeper.order, print)
    assert "PATH" in seen
    assert not [name for name in seen if name.startswith("RAY_")]
