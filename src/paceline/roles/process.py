"""What every role process does around its work: processors, signals, errors, telemetry.

SIGTERM or SIGINT asks the role to stop at the next safe point; it then ends with exit code 0
and everything it committed stays. A PacelineError is reported as an event and ends the process
with the error's own exit code, which tells the supervisor that a restart would not help.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from paceline.config.load import load_run_config
from paceline.errors import PacelineError
from paceline.ledger.gate import RoleLock
from paceline.roles.plan import RunPlan, events_path, plan_run, processors_of_roles
from paceline.telemetry import EventLog

SUPERVISOR_VARIABLE = "PACELINE_SUPERVISOR"
PR_SET_PDEATHSIG = 1

Work = Callable[[RunPlan, EventLog, Callable[[], bool]], None]


def run_role(role: str, run_file: Path, work: Work, *, stops_itself: bool = True) -> int:
    """Run `work` as the only live `role` of the run; the process's exit code.

    Work that has nothing to bring to a safe point (`stops_itself=False`) just ends on a signal.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, (lambda *_: stop.set()) if stops_itself else signal.SIG_DFL)
    _die_with_supervisor()
    events: EventLog | None = None
    try:
        config = load_run_config(run_file)
        plan = plan_run(config)
        lock = RoleLock(config.run.directory, role)
        # A supervisor shows progress by itself; alone in the foreground the role does.
        echo = None if SUPERVISOR_VARIABLE in os.environ or role == "evaluator" else sys.stderr.write
        events = EventLog(events_path(config, role), echo=echo)
        os.sched_setaffinity(0, processors_of_roles(config).get(role, sorted(os.sched_getaffinity(0))))
        events.write("role_started", pid=os.getpid())
        work(plan, events, stop.is_set)
        events.write("role_ended", stopped=stop.is_set())
        lock.release()
    except PacelineError as error:
        if events is not None:
            events.write("error", exit_code=error.exit_code, message=str(error))
        sys.stderr.write(f"paceline {role}: {error}\n")
        return error.exit_code
    return 0


def _die_with_supervisor() -> None:
    """Ask the kernel for SIGTERM when the supervisor dies, so that no role is left behind."""
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(supervisor):  # it died before the request took effect
        os.kill(os.getpid(), signal.SIGTERM)
