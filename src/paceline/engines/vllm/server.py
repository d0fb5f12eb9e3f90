"""A vLLM server that the producer starts, watches, starts again, and ends.

It listens on 127.0.0.1, on a free port, with a random key that only the environment of its process holds. Its
output goes to a log of the run. A record of its process lies in the run's directory, so that the next start
ends a server that a dead run has left.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from paceline.durable_files import replace_file
from paceline.engines.vllm.command import HOST
from paceline.engines.vllm.guard import GRACE_S, end_session, started_at
from paceline.errors import ConfigError, ServerUnavailableError
from paceline.regular_files import read_regular
from paceline.telemetry import read_tail, shorten
from paceline.visible_devices import DEVICES_VARIABLE, names_left

KEY_VARIABLE = "VLLM_API_KEY"  # the server's own name for it
LEDGERS_SECRETS = "PACELINE_REDIS_"  # begins the names of variables that are no business of the server's
OF_SLURM = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")  # numbers on the host, whatever the job may see
GUARD = "paceline.engines.vllm.guard"
RECORD = "server.json"
RECORD_BYTES_MAX = 4096
HANG_S = 60.0  # a server that was ready and is silent for so long is started again
TOLD_CHARACTERS = 600


class ManagedServer:
    def __init__(
        self,
        command: Sequence[str],
        *,
        devices: Sequence[int],
        log: Path,
        directory: Path,
        restarts_max: int,
        report: Callable[..., None],
    ) -> None:
        """`directory`: where the record of its process lies. Raises ConfigError if it cannot be started."""
        found = shutil.which(command[0])
        if found is None:
            raise ConfigError(
                f"There is no program {command[0]} to start the server with.",
                why="engine.managed is true, so the producer starts it.",
                next="install vLLM, or set engine.program, or start a server and set engine.url.",
            )
        self._command = [found, *command[1:]]
        self._devices = devices
        self._visible = visible_devices(devices, os.environ) if devices else ""
        self._log = log
        self._record = directory / RECORD
        self._restarts_max = restarts_max
        self._report = report
        self._lock = threading.RLock()  # held while a server begins or ends
        self._process: subprocess.Popen[bytes] | None = None
        self._began: int | None = None  # when that process started
        self._starts = 0  # without an answer since
        self._has_been_ready = False
        self.url = ""
        self.key = ""

    def end_leftover(self) -> None:
        """End the server that an earlier process of this run left behind."""
        try:
            told = json.loads(read_regular(self._record, RECORD_BYTES_MAX))
            count = end_session(int(told["session"]), int(told["started"]))
        except (OSError, ValueError, TypeError, LookupError):
            return
        self._record.unlink(missing_ok=True)
        if count:
            self._report("server", state="leftover ended", processes=count)

    def ensure(self, silent_s: float) -> bool:
        """Start the server unless it runs; whether it was started. Raises ServerUnavailableError.

        `silent_s`: for how long it has not answered.
        """
        with self._lock:
            with suppress(OSError):
                shorten(self._log)
            if self._process is not None:
                is_silent = self._has_been_ready and silent_s >= HANG_S
                if self._process.poll() is None and not is_silent:
                    return False
                self.stop()  # also what a dead server has left
            if self._starts > self._restarts_max:
                raise self._ends_again_and_again()
            self._start()
            return True

    def was_ready(self) -> None:
        """It has told that it can answer: from now on a long silence is a fault."""
        self._has_been_ready = True

    def answered(self) -> None:
        """It has answered: the count of its restarts begins anew."""
        self._starts = 0

    def stop(self) -> None:
        """End the server and everything that it has started."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        process, self._process, self._has_been_ready = self._process, None, False
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S + 5)
        end_session(process.pid, self._began)
        process.kill()
        process.wait()
        self._record.unlink(missing_ok=True)

    def _start(self) -> None:
        self._starts += 1
        self._has_been_ready = False
        port, self.key = _free_port(), secrets.token_urlsafe(32)
        self.url = f"http://{HOST}:{port}"
        own = {name: value for name, value in os.environ.items() if not name.startswith(LEDGERS_SECRETS)}
        environment = {**own, KEY_VARIABLE: self.key}
        if self._devices:
            environment[DEVICES_VARIABLE] = self._visible
        self._log.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        log = os.open(self._log, flags, 0o600)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", GUARD, *self._command, "--port", str(port)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        if self._devices:
            _give_all_processors(self._process.pid)
        self._began = started_at(self._process.pid)
        record = {"session": self._process.pid, "started": self._began}
        replace_file(self._record, json.dumps(record).encode())
        self._report("server", state="started", where=self.url, pid=self._process.pid, log=str(self._log))

    def _ends_again_and_again(self) -> ServerUnavailableError:
        tail = read_tail(self._log, 8000).decode(errors="replace").replace(self.key, "***")
        said = [line.strip() for line in tail.splitlines() if "rror" in line] or tail.strip().splitlines()
        last = said[-1][:TOLD_CHARACTERS] if said else "it printed nothing"
        return ServerUnavailableError(
            f"The server was started {self._starts} times and ended each time without an answer: {last}",
            why="No prompt failed; nothing is lost.",
            next=f"read {self._log}; correct engine.args or the machine, then run the same command again.",
        )


def visible_devices(devices: Sequence[int], environment: Mapping[str, str]) -> str:
    """What the server's CUDA_VISIBLE_DEVICES is, in this process's environment: `devices` count among those
    that a scheduler or the user has left to the run. Raises ConfigError if there are fewer, or if a scheduler
    has left some and does not tell which.
    """
    named = environment.get(DEVICES_VARIABLE)
    if named is None:
        _refuse_devices_of_other_jobs(environment)
        return ",".join(map(str, devices))
    left = names_left(named)
    if max(devices, default=-1) >= len(left):
        raise ConfigError(
            f"engine.devices is {list(devices)}, and {DEVICES_VARIABLE}={named} leaves {len(left)} of them.",
            why="Devices are counted from 0 among those that this process may use.",
            next=f"name other devices in engine.devices, or change {DEVICES_VARIABLE}.",
        )
    return ",".join(left[number] for number in devices)


def _refuse_devices_of_other_jobs(environment: Mapping[str, str]) -> None:
    given = [f"{name}={environment[name]}" for name in OF_SLURM if environment.get(name)]
    if given:
        raise ConfigError(
            f"Slurm gave this job GPUs ({given[0]}), and {DEVICES_VARIABLE} is not set.",
            why="Which GPUs of the host are this job's is unknown: the server could take another job's.",
            next=f"do not unset it; or set {DEVICES_VARIABLE} to those numbers if the job sees all GPUs of "
            "its host (nvidia-smi), and to 0, 1 and so on if it sees its own alone.",
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _give_all_processors(pid: int) -> None:
    """The producer keeps to few processors; a server of GPUs gets those of the producer's parent."""
    with suppress(OSError):
        os.sched_setaffinity(pid, os.sched_getaffinity(os.getppid()))
