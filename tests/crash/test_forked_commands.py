"""Commands that run as forks (src/paceline/testing/forked_commands.py) are the processes that a user gets."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paceline.ledger.locks import live_holder
from paceline.telemetry import read_events
from paceline.testing.tiny_run import TinyRun, executed


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


def starts(run: TinyRun, role: str) -> list[int]:
    """The ids of its processes so far."""
    events = read_events(run.directory / "events" / f"{role}.jsonl")
    return [event["pid"] for event in events if event["event"] == "role_started"]


def open_files(pid: int) -> set[str]:
    return {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}


def test_a_forked_role_is_its_supervisors_child_and_its_death_is_noticed(
    tiny_model: Path, tmp_path: Path
) -> None:
    """In a session of its own, with nothing of the supervisor's open; it is started again."""
    run = TinyRun(tmp_path, tiny_model)
    with ThreadPoolExecutor(1) as waiting:
        train = waiting.submit(run.command, "train")
        while not (started := starts(run, "consumer")):
            assert not train.done(), train.result().stderr
            time.sleep(0.005)
        supervisor, [consumer] = live_holder(run.directory, "supervisor"), started
        assert supervisor == parent_of(consumer) != os.getpid()
        assert os.getsid(consumer) == consumer
        assert str(run.directory / "supervisor.lock") in open_files(supervisor)
        assert str(run.directory / "supervisor.lock") not in open_files(consumer)
        os.kill(consumer, signal.SIGKILL)
    ended = train.result()
    assert ended.returncode == 0, ended.stderr
    assert len(starts(run, "consumer")) == 2


def test_a_forked_command_says_what_a_user_reads(tiny_model: Path, tmp_path: Path) -> None:
    """The same output, errors and exit codes, of the command and of a role that takes its place."""
    run = TinyRun(tmp_path, tiny_model, prompts={"path": str(tmp_path / "none.jsonl")})
    for verb in ("status", "produce"):
        forked, real = run.command(verb), executed(run.arguments(verb), run.environment())
        assert forked.returncode == real.returncode == 2
        assert forked.stdout == real.stdout
        assert forked.stderr == real.stderr
        assert "Next:" in real.stderr or "next " in real.stderr
