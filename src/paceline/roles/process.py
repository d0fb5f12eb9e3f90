"""Runs a role's work in its process: sets up processors and signals, and reports errors.

SIGTERM, SIGINT or SIGHUP asks the role to stop at the next safe point; it then ends with exit code 0, and
everything that it committed stays. A second signal ends it at once; a role whose supervisor has died ends
after a minute, wherever it is. The role reports an error as an event,
and to the supervisor through a pipe, which works on a full disk too. A PacelineError ends the process with
the error's exit code, from which the supervisor knows that a restart would not help.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import DEBUG_VARIABLE, PacelineError, explained
from paceline.ledger.locks import RoleLock
from paceline.roles.plan import RunPlan, events_path, plan_run, processors_of_roles
from paceline.telemetry import EventLog
from paceline.terminal import Output, open_standard_streams, printable

SUPERVISOR_VARIABLE = "PACELINE_SUPERVISOR"
REPORT_VARIABLE = "PACELINE_REPORT_FD"
PR_SET_PDEATHSIG = 1
ORPHAN_S = 60  # for an orphan to reach its next safe point: a consumer writes a checkpoint
PART_CHARACTERS_MAX = 4000  # of an error's what, why and next: the pipe must take all of them at once

Work = Callable[[RunPlan, EventLog, Callable[[], bool]], None]


def run_role(
    role: str,
    run_file: Path,
    work: Work,
    *,
    take: Callable[[RunConfig], RoleLock] | None = None,
    stops_itself: bool = True,
) -> int:
    """Run `work` as the only live `role` of the run; returns the process's exit code.

    `take`: takes the lock of the role, or of another one that it chooses. With `stops_itself=False`, for work
    that needs no safe point, a signal ends the process at once.
    """
    open_standard_streams()
    for name in ("stdout", "stderr"):
        Output(name).replace()
    stop = threading.Event()
    if stops_itself:
        _set_on_signals(stop)
    die_with_supervisor()
    events: EventLog | None = None
    try:
        config = load_run_config(run_file)
        plan = plan_run(config)
        if stop.is_set():  # asked to end before it began; its successor may be starting already
            return 0
        lock = RoleLock(config.run.directory, role) if take is None else take(config)
        role = lock.role
        # Under a supervisor, the supervisor shows progress; a role that runs alone prints its own events.
        echo = None if SUPERVISOR_VARIABLE in os.environ or not stops_itself else sys.stderr.write
        events = EventLog(events_path(config, role), echo=echo)
        os.sched_setaffinity(0, processors_of_roles(config).get(role, sorted(os.sched_getaffinity(0))))
        events.write("role_started", pid=os.getpid())
        work(plan, events, stop.is_set)
        events.write("role_ended", stopped=stop.is_set())
        lock.release()
    except Exception as error:  # noqa: BLE001 (every error is reported)
        return _report(role, error, events)
    return 0


def _report(role: str, error: Exception, events: EventLog | None) -> int:
    """Report the error on every channel that works; returns the exit code."""
    told = explained(error)
    if not isinstance(error, PacelineError) and {SUPERVISOR_VARIABLE, DEBUG_VARIABLE} & os.environ.keys():
        sys.stderr.write(
            printable("".join(traceback.format_exception(error)))
        )  # under a supervisor stderr is a log file
    parts = {name: getattr(told, name)[:PART_CHARACTERS_MAX] for name in ("what", "why", "next")}
    if events is not None:
        events.write("error", exit_code=told.exit_code, message=str(told))
    with suppress(OSError, ValueError):
        fd = int(os.environ.get(REPORT_VARIABLE, "-1"))
        os.write(fd, json.dumps({"exit_code": told.exit_code, **parts}).encode())
    sys.stderr.write(printable(f"paceline {role}: {told}\n"))
    return told.exit_code


def _set_on_signals(stop: threading.Event) -> None:
    def ask(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        if _is_orphan():
            signal.alarm(ORPHAN_S)  # nobody else ends it; a kill undoes nothing that it has committed

    for number in stop_signals():
        signal.signal(number, ask)


def stop_signals() -> list[signal.Signals]:
    """What asks a process of a run to stop: a hang-up only where `nohup` has not had it ignored."""
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGINT, signal.SIGTERM, *hang_up]


def die_with_supervisor() -> None:
    """Ask the kernel for SIGTERM when the supervisor dies, so that no role outlives it for long."""
    if SUPERVISOR_VARIABLE not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if _is_orphan():  # it died before the request took effect
        os.kill(os.getpid(), signal.SIGTERM)


def _is_orphan() -> bool:
    return os.environ.get(SUPERVISOR_VARIABLE) not in (None, str(os.getppid()))
