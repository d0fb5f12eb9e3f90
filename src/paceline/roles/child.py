"""Child: a role's process, which the supervisor starts, asks to stop, and whose error it reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paceline.config.run import RunConfig
from paceline.errors import PacelineError
from paceline.ledger.locks import UNKNOWN, live_holder
from paceline.roles.plan import log_path, role_environment
from paceline.roles.process import REPORT_VARIABLE, SUPERVISOR_VARIABLE
from paceline.roles.trainers import without_place
from paceline.roles.workers import is_producer, worker_of
from paceline.telemetry import read_tail, shorten

ORPHAN_S = 10.0  # time for an orphan to reach its next safe point
GRACE_S = {  # the consumer writes a checkpoint
    "producer": 15.0,
    "consumer": 60.0,
    "evaluator": 5.0,
    "exporter": 5.0,
    "answers_exporter": 5.0,
    "comparer": 5.0,
}


def grace_s(role: str) -> float:
    """How long the role may take to reach its next safe point once it is asked to stop."""
    return GRACE_S[role.partition("-")[0]]


WITHOUT_SAFE_POINT = ("evaluator", "exporter", "answers_exporter", "comparer")
REPORT_BYTES_MAX = 1 << 16


class RoleFailedError(PacelineError):
    """A role ended with an error; message and exit code are those of the role."""

    def __init__(self, what: str, why: str, next: str, exit_code: int) -> None:
        super().__init__(what, why=why, next=next)
        self.exit_code = exit_code


class Child:
    """One process of a role, in a session of its own, so that Ctrl-C reaches only the supervisor."""

    def __init__(
        self,
        role: str,
        run_file: Path,
        config: RunConfig,
        threads: int,
        *arguments: str,
        environment: Mapping[str, str] = MappingProxyType({}),
        descriptors: Sequence[int] = (),
    ) -> None:
        """`environment`: variables besides the parent's; `descriptors`: open files that it inherits."""
        self.role = role
        module = role.partition("-")[0]
        if is_producer(role):
            arguments = (worker_of(role), *arguments)
        self._log = log_path(config, role)
        self._pipe, other_end = os.pipe()
        os.set_blocking(self._pipe, False)
        os.set_blocking(other_end, False)
        log = opened_log(self._log)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"paceline.roles.{module}", str(run_file), *arguments],
                env={
                    **without_place(os.environ),
                    **environment,
                    **role_environment(threads),
                    SUPERVISOR_VARIABLE: str(os.getpid()),
                    REPORT_VARIABLE: str(other_end),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[other_end, *descriptors],
                start_new_session=True,
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(log)
            os.close(other_end)

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; returns whether the process has ended."""
        try:
            self._process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    _asked = False  # to stop at its next safe point

    def send(self, number: signal.Signals) -> None:
        """Send the signal; SIGTERM only once, because a second one would end the role at once."""
        if number == signal.SIGTERM:
            if self._asked:
                return
            self._asked = True
        if self._process.poll() is None:
            self._process.send_signal(number)

    def end(self, deadline: float) -> None:
        """Kill the process if it has not ended by `deadline` (time.monotonic), and release it."""
        if not self.wait(deadline - time.monotonic()):
            self._process.kill()
            self._process.wait()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def run_in_the_background(self, processors: Collection[int]) -> None:
        """Let it compute only while nothing else wants to; on `processors` alone, if there are any."""
        pid = self._process.pid
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, pid, 19)
        with suppress(OSError):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        with suppress(OSError):  # where the kernel shares processors among sessions, not processes
            Path(f"/proc/{pid}/autogroup").write_text("19")
        if processors:
            with suppress(OSError):
                os.sched_setaffinity(pid, processors)

    def keep_log_short(self) -> None:
        with suppress(OSError):
            shorten(self._log)

    def error(self) -> RoleFailedError | None:
        """The error that it reported; None if it was killed or ended without an error."""
        code = self._process.returncode
        with suppress(OSError, ValueError, LookupError, TypeError):
            told: dict[str, Any] = json.loads(os.read(self._pipe, REPORT_BYTES_MAX))
            return RoleFailedError(
                str(told["what"]), str(told["why"]), str(told["next"]), int(told["exit_code"])
            )
        if code is None or code <= 0:
            return None
        # It failed before it could report an error: its log has Python's message.
        said = read_tail(self._log, 4000).decode(errors="replace").strip().rpartition("\n")[2]
        return RoleFailedError(
            f"The {self.role} could not begin: {said or f'it ended with {code} and printed nothing'}",
            "Nothing was changed.",
            f"read {self._log}, and check that this Python has all that Paceline needs.",
            code,
        )


def opened_log(path: Path) -> int:
    """The log, for appending; /dev/null if it cannot be opened."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o644)
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def end_orphan(directory: Path, role: str, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Wait for a role whose supervisor was killed; kill it if it does not stop in time.

    The kernel has asked it to stop, and a kill undoes nothing that it has committed.
    """
    deadline = time.monotonic() + (0.0 if role in WITHOUT_SAFE_POINT else ORPHAN_S)
    while not should_stop():
        holder = live_holder(directory, role)
        if holder is None or (holder != UNKNOWN and not _was_orphaned(holder)):
            return
        if time.monotonic() >= deadline and holder != UNKNOWN:
            _kill_orphan(holder)
        if time.monotonic() >= deadline + ORPHAN_S:
            return  # the start itself will name the holder
        time.sleep(0.05)


def _kill_orphan(pid: int) -> None:
    with suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            if _was_orphaned(pid):  # still that process, not a later one with its id
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _was_orphaned(pid: int) -> bool:
    """Whether the process has outlived the supervisor that started it, or was killed and is just ending."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        parent = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1]
    except ProcessLookupError:
        return True  # a process that ends loses its memory, and its environment, before its locks
    except (OSError, IndexError):
        return False
    name = f"{SUPERVISOR_VARIABLE}=".encode()
    told = [item[len(name) :] for item in environment.split(b"\0") if item.startswith(name)]
    return not environment or any(supervisor != parent for supervisor in told)
