"""`paceline stop`: it asks the process that really holds a role, once, and waits for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.cli import stop
from paceline.cli.main import app
from paceline.errors import PacelineError
from paceline.ledger.locks import RoleLock, _naming, live_holder
from paceline.roles.process import SUPERVISOR_VARIABLE
from paceline.roles.stopping import live_roles, stop_role
from paceline.testing.run_by_hand import RunByHand

# Takes a role and says so. At a signal it writes a line; then its input decides when it ends.
HOLDER = """
import signal, sys
from pathlib import Path
from paceline.ledger.locks import RoleLock
def ask(number, _):
    print("asked", flush=True)
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGTERM, ask)
lock = RoleLock(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""
# Starts a holder of its own, as `paceline evaluate` does, and tells of a signal.
STARTER = """
import os, signal, subprocess, sys
def ask(*_):
    print("starter asked", flush=True)
    child.kill()
signal.signal(signal.SIGTERM, ask)
environment = {**os.environ, sys.argv[1]: str(os.getpid())}
child = subprocess.Popen([sys.executable, "-c", *sys.argv[2:]], env=environment)
child.wait()
"""
Held = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    """Starts a process that holds a role of the run in `tmp_path`."""
    started = []

    def start(role: str, *before: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", *before, HOLDER, str(tmp_path), role]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_role_is_asked_once_and_waited_for(tmp_path: Path, held: Held) -> None:
    """A second signal would end it without a safe point."""
    process, looks = held("supervisor"), []

    def look() -> None:
        looks.append(live_holder(tmp_path, "supervisor"))
        if len(looks) == 1:
            assert told(process) == "asked\n"
        if len(looks) == 3:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()

    stop_role(tmp_path, "supervisor", at_once=False, look=look)
    assert looks == [process.pid] * 3
    assert process.returncode == 0
    assert live_roles(tmp_path) == []


def test_at_once_needs_no_safe_point(tmp_path: Path, held: Held) -> None:
    """The process would wait for its input for ever."""
    process = held("consumer")
    stop_role(tmp_path, "consumer", at_once=True, look=lambda: told(process) and None)
    assert process.wait() == -15


def test_a_measurement_ends_with_the_command_that_waits_for_it(tmp_path: Path, held: Held) -> None:
    """Else that command would report a measurement that failed."""
    starter = held("evaluator", STARTER, SUPERVISOR_VARIABLE)
    lines: list[str] = []
    stop_role(tmp_path, "evaluator", at_once=False, look=lambda: lines.append(told(starter)))
    assert "starter asked\n" in lines


def test_a_process_that_does_not_hold_the_role_is_left_alone(tmp_path: Path) -> None:
    """A lock may be held in another container, where the number in it means another process."""
    lock = RoleLock(tmp_path, "supervisor")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / "supervisor.lock").write_bytes(_naming(other.pid))
        with pytest.raises(PacelineError, match=f"its process \\({other.pid}\\) is not here"):
            stop_role(tmp_path, "supervisor", at_once=False, look=lambda: None)
        (tmp_path / "supervisor.lock").write_bytes(b"nonsense")
        with pytest.raises(PacelineError, match="unnamed"):
            stop_role(tmp_path, "supervisor", at_once=False, look=lambda: None)
        assert other.poll() is None
        other.communicate(b"\n")
    lock.release()


def test_another_users_run_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is changed."""
    lock = RoleLock(tmp_path, "supervisor")

    def refuse(_: Path) -> object:
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PacelineError, match="belongs to another user"):
        stop_role(tmp_path, "supervisor", at_once=False, look=lambda: None)
    monkeypatch.undo()
    lock.release()


# -- the command ---------------------------------------------------------------------------


def test_stop_says_where_the_run_goes_on(tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor goes first, and then what it did not start: a producer that joined."""
    run = RunByHand(tmp_path)
    run.train(run.capture(2))
    run.checkpoint()
    run.train(run.capture(1))
    run.ledger.close()
    supervisor, producer = held("supervisor"), held("producer-1")

    def sleep(_: float) -> None:
        for process in (supervisor, producer):
            if process.poll() is None and live_roles(tmp_path)[0] in ("supervisor", "producer-1"):
                assert told(process) == "asked\n"
                process.stdin.close()  # type: ignore[union-attr]
                process.wait()
                return

    monkeypatch.setattr(stop.time, "sleep", sleep)
    result = CliRunner().invoke(app, ["stop", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "stopping the supervisor at its next safe point ...",
        "stopping the producer-1 at its next safe point ...",
        "Stopped, with a checkpoint at step 1; 1 samples after it are trained again.",
        "Go on with: paceline train RUN.yaml",
    ]
    again = CliRunner().invoke(app, ["stop", str(tmp_path)])
    assert again.output.startswith("No process of the run is live on this host, with a checkpoint at step 1")


def test_there_is_nothing_to_stop_where_no_run_is(tmp_path: Path) -> None:
    """An error, as of every verb that names a run."""
    result = CliRunner().invoke(app, ["stop", str(tmp_path)])
    assert result.exit_code == 2
    assert "There is no run in" in result.output
