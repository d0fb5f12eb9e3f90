"""What a role's process does around its work: its reason reaches the supervisor, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from paceline.ledger.locks import RoleLock, live_holder
from paceline.roles import child
from paceline.roles.child import Child, end_orphan
from paceline.roles.process import REPORT_VARIABLE, SUPERVISOR_VARIABLE

ROLE = """
import resource, sys, time
from pathlib import Path
from paceline.errors import LedgerError
from paceline.roles import process
from paceline.roles.process import run_role

def work(plan, events, should_stop):
    if sys.argv[2] == "waits":
        print("ready", flush=True)
        while not should_stop():
            time.sleep(0.01)
        return
    elif sys.argv[2] == "hangs":
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
    elif sys.argv[2] == "hangs as an orphan":
        process.ORPHAN_S = 1
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
    elif sys.argv[2] == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        raise LedgerError("the disk is full", why="all is safe", next="free space")
    raise KeyError("weight_map")

sys.exit(run_role("producer", Path(sys.argv[1]), work))
"""


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "vocab_size": 61,
}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    config = {
        "run": {"name": "r", "directory": str(tmp_path / "run")},
        "target": {"model": str(tmp_path / "model")},
        "prompts": {"path": str(tmp_path / "train.jsonl")},
        "evaluation": {"prompts": str(tmp_path / "heldout.jsonl")},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(run_file: Path, what: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ROLE, str(run_file), what],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # `nohup make test` ignores it
    )


def reported(run_file: Path, what: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of a role whose stderr goes to a full device."""
    read, write = os.pipe()
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ROLE, str(run_file), what],
            env={**os.environ, REPORT_VARIABLE: str(write), SUPERVISOR_VARIABLE: str(os.getpid())},
            pass_fds=[write],
            stderr=full,
            check=False,
        )
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return done.returncode, json.loads(pipe.read())


def test_a_full_disk_under_logs_and_events_hides_no_reason(run_file: Path) -> None:
    """It goes through a pipe, and the exit code is the error's own."""
    code, report = reported(run_file, "full disk")
    assert code == 6
    parts = {"what": "the disk is full", "why": "all is safe", "next": "free space"}
    assert report == {"exit_code": 6, **parts}


def test_an_error_that_is_not_ours_is_told_as_one_of_ours(run_file: Path) -> None:
    """With its name; the traceback is in the log alone."""
    code, report = reported(run_file, "fails")
    assert code == report["exit_code"] == 1
    assert "KeyError: 'weight_map'" in report["what"]
    said = start(run_file, "fails").communicate()[1]
    assert "Traceback" not in said
    assert said.count("weight_map") == 1  # and is told once


def test_a_second_signal_ends_a_role_that_does_not_stop(run_file: Path) -> None:
    """The first one asks; a role that hangs in its work never hears it."""
    with start(run_file, "hangs") as role:
        assert role.stdout is not None
        assert role.stdout.readline() == "ready\n"
        role.send_signal(signal.SIGINT)
        while role.poll() is None:
            role.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                role.wait(timeout=1)
        assert role.returncode == -signal.SIGINT


def test_a_hang_up_is_a_wish_to_stop(run_file: Path) -> None:
    """The terminal of a role in the foreground went away."""
    with start(run_file, "waits") as role:
        assert role.stdout is not None
        assert role.stdout.readline() == "ready\n"
        role.send_signal(signal.SIGHUP)
        assert role.wait() == 0


def test_a_role_whose_supervisor_died_before_it_began_leaves_the_lock_alone(run_file: Path) -> None:
    """The next start sees no holder while the orphan still imports; an orphan that then took the lock would
    refuse the role that this start has begun."""
    with start(run_file, "waits", **{SUPERVISOR_VARIABLE: "1"}) as orphan:
        said, _ = orphan.communicate()
    assert (orphan.returncode, said) == (0, "")
    assert live_holder(run_file.parent / "run", "producer") is None
    assert not (run_file.parent / "run" / "producer.lock").exists()


SUPERVISOR = """
import os, subprocess, sys
os.environ[sys.argv.pop(1)] = str(os.getpid())
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


def test_a_role_that_hangs_does_not_outlive_a_killed_supervisor_for_long(run_file: Path) -> None:
    """It is asked to stop, hears nothing of it, and ends at its time: until then it has the pipe open."""
    command = [sys.executable, "-c", SUPERVISOR, SUPERVISOR_VARIABLE, ROLE, str(run_file)]
    with subprocess.Popen([*command, "hangs as an orphan"], text=True, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "ready\n"
        supervisor.kill()
        assert supervisor.stdout.read() == ""
    assert live_holder(run_file.parent / "run", "producer") is None


HOLDER = """
import signal, sys
from pathlib import Path
from paceline.ledger.locks import RoleLock
signal.signal(signal.SIGTERM, signal.SIG_IGN)
lock = RoleLock(Path(sys.argv[1]), "evaluator")
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_start_waits_for_a_killed_role_that_still_holds_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes memory and environment from a process that ends, and its locks a moment later.

    A start in that moment would be refused for a process that is as good as gone. A zombie lost them, too.
    """
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        looks = iter([ended.pid, ended.pid, None])
        monkeypatch.setattr(child, "live_holder", lambda *_: next(looks))
        end_orphan(tmp_path, "producer")
    assert list(looks) == [], "it waited until no process held the lock"


@pytest.mark.parametrize("is_orphan", [True, False])
def test_a_start_ends_an_orphan_and_nothing_else(tmp_path: Path, is_orphan: bool) -> None:
    """One with a live supervisor, or without any, keeps its role; the start is refused instead."""
    supervisor = "1" if is_orphan else str(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env={**os.environ, SUPERVISOR_VARIABLE: supervisor},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        end_orphan(tmp_path, "evaluator")
        if is_orphan:
            assert holder.wait() == -signal.SIGKILL
            RoleLock(tmp_path, "evaluator").release()
        else:
            assert live_holder(tmp_path, "evaluator") == holder.pid
            assert holder.stdin is not None
            holder.stdin.close()
            assert holder.wait() == 0


def test_a_role_is_asked_to_stop_once_however_often_its_supervisor_asks() -> None:
    """At a second SIGTERM it would end at once, without the checkpoint that its safe point writes."""
    sent: list[signal.Signals] = []
    asked = object.__new__(Child)
    asked._process = SimpleNamespace(poll=lambda: None, send_signal=sent.append)  # type: ignore[assignment]
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        asked.send(number)
    assert sent == [signal.SIGTERM, signal.SIGKILL]
