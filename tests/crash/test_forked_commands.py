"""Forked commands (src/paceline/testing/forked_commands.py) and template workers are what a user gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paceline.ledger.locks import live_holder
from paceline.target.template import ChatTemplate
from paceline.telemetry import read_events
from paceline.testing.forked_commands import ForkedCommands
from paceline.testing.forked_templates import ForkedTemplates
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


def test_a_forked_command_asks_a_process_what_a_users_command_asks(tiny_model: Path, tmp_path: Path) -> None:
    """`data check` renders the prompts of a run in a process of its own, and says what that found."""
    run = TinyRun(tmp_path, tiny_model)
    command = [*run.arguments("data")[:-1], "check", str(run.run_file)]
    forked, real = run.run(command), executed(command, run.environment())
    assert (forked.returncode, forked.stdout, forked.stderr) == (0, real.stdout, real.stderr)
    assert "20 samples" in real.stdout


def test_a_forked_process_is_what_proc_says_of_it(forked_commands: ForkedCommands) -> None:
    """Its arguments and its environment, and nothing of those of the process that it was forked from."""
    environment = {"FIRST": "of two", "SECOND": "\u00fc"}
    code = (
        "import json; words = lambda name: open(f'/proc/self/{name}').read().rstrip(chr(0)).split(chr(0))\n"
    )
    code += "print(json.dumps([words('cmdline'), words('environ')]))"
    arguments = [sys.executable, "-c", code, "an argument"]
    told = forked_commands.run(arguments, environment)
    assert json.loads(told.stdout) == [arguments, ["FIRST=of two", "SECOND=\u00fc"]], told.stderr


def test_forked_processes_live_beside_each_other(forked_commands: ForkedCommands) -> None:
    """One that sleeps keeps no other one waiting, and is killed alone."""
    code = "import time; print('here', flush=True); time.sleep(600)"
    with forked_commands.begin([sys.executable, "-c", code], os.environ) as sleeper:
        assert forked_commands.script("import sys; sys.exit(3)").returncode == 3
        while not sleeper.out.read_text():
            time.sleep(0.005)
        with pytest.raises(subprocess.TimeoutExpired):
            sleeper.wait(timeout=0)
        assert sleeper.poll() is None
        sleeper.kill()
        assert sleeper.communicate() == ("here\n", "")
        assert sleeper.returncode == -signal.SIGKILL


def test_a_forked_worker_renders_what_a_started_one_renders(forked_templates: ForkedTemplates) -> None:
    """The same text and spans, and an end when nobody needs it any more."""
    chat = [{"role": "user", "content": "hello"}]
    told = []
    for start in (forked_templates.start, forked_templates.executed):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("paceline.target.template._start", start)
            template = ChatTemplate()
        template.use("{% generation %}{{ messages[0].content }}{% endgeneration %}{{ kind }}", {"kind": "x"})
        rendered = template.render(chat)
        process = template._process
        assert process is not None
        process.stdin.close()
        told.append((rendered, process.wait()))
        template.close()
    assert told[0] == told[1]
    assert told[0][0].text == "hellox"
