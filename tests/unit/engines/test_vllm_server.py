"""A managed server: started, started again, ended with its producer, and found when a dead run left it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.engines.vllm.guard import end_session, started_at
from paceline.engines.vllm.server import GUARD, RECORD, ManagedServer, visible_devices
from paceline.errors import ConfigError, ServerUnavailableError

# It tells its environment, begins a worker of its own, and waits for its end.
SERVER = """
import json, os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
names = ("VLLM_API_KEY", "CUDA_VISIBLE_DEVICES", "PACELINE_REDIS_PASSWORD")
told = {"worker": worker.pid, "args": sys.argv[1:], **{n: os.environ.get(n) for n in names}}
print(json.dumps(told), flush=True)
worker.wait()
"""


class Made:
    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.events = folder, folder / "logs" / "vllm.log", []
        self.servers: list[ManagedServer] = []

    def __call__(self, script: str = SERVER, **knobs: Any) -> ManagedServer:
        given = {"devices": (), "restarts_max": 2, **knobs}
        command = given.pop("command", [sys.executable, "-c", script])
        report: Callable[..., None] = lambda event, **fields: self.events.append(fields)  # noqa: E731
        server = ManagedServer(command, log=self.log, directory=self.folder, report=report, **given)
        self.servers.append(server)
        return server

    def told(self, count: int = 1) -> list[dict[str, Any]]:
        """What the servers have printed, once there are so many lines."""
        while True:
            lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
            if sum(line.endswith("\n") for line in lines) >= count:
                return [json.loads(line) for line in lines]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Made]:
    made = Made(tmp_path)
    yield made
    for server in made.servers:
        server.stop()


@pytest.mark.parametrize(
    ("devices", "named", "visible"),
    [
        ((0,), "4,5", "4"),
        ((1, 0), " GPU-8f1c, GPU-2b7e ", "GPU-2b7e,GPU-8f1c"),
        ((0, 2), None, "0,2"),
    ],
)
def test_devices_count_among_those_that_the_run_was_given(
    devices: tuple[int, ...], named: str | None, visible: str
) -> None:
    """As for the trainer, whose cuda:0 is the first of them: else the server would take others' devices."""
    assert visible_devices(devices, {} if named is None else {"CUDA_VISIBLE_DEVICES": named}) == visible


def test_a_device_that_the_run_was_not_given_is_refused(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the server is started."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ConfigError, match="leaves 1 of them"):
        make(devices=(0, 1))


@pytest.mark.parametrize("name", ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS"])
def test_a_job_of_slurm_that_does_not_know_its_gpus_starts_no_server_on_some(
    make: Made, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its numbers are the host's; whether the job sees the host's, or its own from 0 on, they do not say."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(name, "2,3")
    with pytest.raises(ConfigError, match=f"Slurm gave this job GPUs .{name}=2,3") as caught:
        make(devices=(0,))
    assert "nvidia-smi" in caught.value.next
    make(devices=())


def wait_for_end(pid: int) -> None:
    while started_at(pid) is not None:
        os.sched_yield()


def test_it_listens_on_this_machine_with_a_key_that_no_log_and_no_command_line_shows(
    make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every start has a port and a key of its own, and none is given the ledger's password."""
    monkeypatch.setenv("PACELINE_REDIS_PASSWORD", "sesame")
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(name, raising=False)
    server = make(devices=(1, 3))
    assert server.ensure(0.0)
    assert not server.ensure(0.0)
    [told] = make.told()
    assert server.url == f"http://127.0.0.1:{told['args'][1]}"
    assert (told["VLLM_API_KEY"], told["CUDA_VISIBLE_DEVICES"]) == (server.key, "1,3")
    assert told["PACELINE_REDIS_PASSWORD"] is None
    assert len(server.key) > 30
    assert server.key not in (make.folder / RECORD).read_text() + json.dumps(make.events)
    first = server.key
    server.stop()
    wait_for_end(told["worker"])
    assert server.ensure(0.0)
    assert server.key != first


def test_a_server_that_dies_is_started_again_until_its_restarts_are_used_up(make: Made) -> None:
    """With the last words of its log; an answer between begins the count anew."""
    server = make("raise SystemExit('ValueError: no room for the cache')")
    for _ in range(3):
        assert server.ensure(0.0)
        server._process.wait()  # type: ignore[union-attr]
    with pytest.raises(ServerUnavailableError, match=r"started 3 times .*no room for the cache"):
        server.ensure(0.0)
    server.answered()
    assert server.ensure(0.0)


def test_a_server_that_was_ready_and_is_silent_for_long_is_started_again(make: Made) -> None:
    """One that is still loading is not."""
    server = make()
    server.ensure(0.0)
    assert not server.ensure(3600.0)
    server.was_ready()
    assert not server.ensure(1.0)
    [told] = make.told()
    assert server.ensure(3600.0)
    wait_for_end(told["worker"])


def test_no_server_begins_before_the_one_before_it_has_ended(
    make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start beside a stop waits for it, so the record is that of the server that runs."""
    server = make()
    server.ensure(0.0)
    first = server._process
    start, started = threading.Thread(target=server.ensure, args=(0.0,)), []

    def slowly(leader: int, began: int | None) -> int:
        if not started:
            start.start()
            start.join(0.3)  # as long as a start takes that does not wait
        started.append(server._process)
        return end_session(leader, began)

    monkeypatch.setattr("paceline.engines.vllm.server.end_session", slowly)
    server.stop()
    start.join()
    assert started == [None]
    assert server._process not in (None, first)
    assert json.loads((make.folder / RECORD).read_text())["session"] == server._process.pid  # type: ignore[union-attr]


def test_no_server_outlives_a_producer_that_was_killed(make: Made) -> None:
    """The pipe to the guard closes, however the producer ends."""
    starts = (
        "import sys, time; from pathlib import Path; from paceline.engines.vllm.server import ManagedServer\n"
        f"command, folder = [sys.executable, '-c', {SERVER!r}], Path({str(make.folder)!r})\n"
        "log, report = folder / 'logs' / 'vllm.log', lambda *_, **__: None\n"
        "s = ManagedServer(command, devices=(), log=log, directory=folder, restarts_max=1, report=report)\n"
        "s.ensure(0.0); time.sleep(600)"
    )
    producer = subprocess.Popen([sys.executable, "-c", starts])
    [told] = make.told()
    producer.send_signal(signal.SIGKILL)
    producer.wait()
    wait_for_end(told["worker"])


def test_a_server_whose_guard_was_killed_too_is_found_by_process_and_start_time(make: Made) -> None:
    """And no other process that has got the same number since."""
    server = make()
    server.ensure(0.0)
    [told] = make.told()
    record = json.loads((make.folder / RECORD).read_text())
    os.kill(record["session"], signal.SIGKILL)
    server._process.wait()  # type: ignore[union-attr]
    assert started_at(told["worker"]) is not None
    successor = make()
    successor.end_leftover()
    wait_for_end(told["worker"])
    assert make.events[-1]["state"] == "leftover ended"
    assert not (make.folder / RECORD).exists()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        began = started_at(other.pid)
        assert began is not None
        assert end_session(other.pid, began - 1) == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_record_that_is_damaged_ends_nothing(make: Made) -> None:
    """It is only a note."""
    for content in ("", "[]", '{"session": "x"}', '{"session": 1, "started": null}'):
        (make.folder / RECORD).write_text(content)
        make().end_leftover()


def test_a_program_that_is_not_there_is_told_at_the_start(make: Made) -> None:
    """With the three ways out."""
    with pytest.raises(ConfigError, match=r"no program .*engine.program.*engine.url"):
        make(command=["no-such-program-of-vllm"])
    assert GUARD.startswith("paceline.")
