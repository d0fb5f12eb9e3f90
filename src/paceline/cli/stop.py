"""`paceline stop`: ends a run in good order, and says where it goes on."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from rich.console import Console

from paceline.cli.named_run import directory_of
from paceline.cli.plain import out, say
from paceline.errors import ConfigError
from paceline.monitoring.status import read_status
from paceline.roles.snapshot import has_ledger, open_run
from paceline.roles.stopping import live_roles, stop_role

LOOK_S = 0.5
TELL_S = 20.0


def stop_run(run: Path, *, at_once: bool) -> None:
    """Raises ConfigError if there is no run, PacelineError if a process of it cannot be stopped."""
    directory = directory_of(run)
    stopped = False
    while roles := live_roles(directory):
        role, stopped = roles[0], True
        say(out, f"stopping the {role} {'at once' if at_once else 'at its next safe point'} ...")
        stop_role(directory, role, at_once=at_once, look=partial(_wait, _Patience(out, role)))
    if not stopped and not has_ledger(directory):
        open_run(directory)  # raises the error with advice
    _say_where(run, directory, stopped=stopped)


class _Patience:
    """Says now and then that a stop takes its time."""

    def __init__(self, console: Console, role: str) -> None:
        self._console, self._role = console, role
        self._due = time.monotonic() + TELL_S

    def tell(self) -> None:
        if time.monotonic() >= self._due:
            self._due += TELL_S
            say(self._console, f"the {self._role} still works towards it; at once: paceline stop RUN --now")


def _wait(patience: _Patience) -> None:
    time.sleep(LOOK_S)
    patience.tell()


def _say_where(run: Path, directory: Path, *, stopped: bool) -> None:
    try:
        status = read_status(directory)
    except ConfigError:
        say(out, "Stopped before the run began.")
        return
    done = "Stopped" if stopped else "No process of the run is live on this host"
    step = status.checkpoint.step
    where = "before its first checkpoint" if step is None else f"with a checkpoint at step {step}"
    later = status.samples.provisional
    say(out, f"{done}, {where}{f'; {later} samples after it are trained again' if later else ''}.")
    for one in status.processes:
        if one.state == "elsewhere":
            say(out, f"{one.role} on host {one.host} is not stopped by this: stop it there.")
    again = f"paceline train {run if run != directory else 'RUN.yaml'}"
    if status.state == "complete" and stopped:
        say(out, f"The training is complete. What is left of measuring and exporting: {again}")
    elif status.state == "complete":
        say(out, "The run is complete.")
    else:
        say(out, f"Go on with: {again}")
