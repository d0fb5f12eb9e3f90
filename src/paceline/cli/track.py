"""`paceline track`: sends a run's curves to trackers until the run ends; `paceline train` starts it, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

from paceline.cli.named_run import directory_if_any, run_file_of
from paceline.cli.plain import out, say
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.monitoring.looking import Look, RunLooks
from paceline.monitoring.tracking import Tracking, track
from paceline.roles.child import opened_log
from paceline.roles.process import SUPERVISOR_VARIABLE, stop_signals
from paceline.trackers.table import TRACKERS

LOOK_S = 2.0
LAST_POINTS_S = 60.0


def track_run(run: Path, to: Sequence[str], project: str | None) -> None:
    """`to`, `project`: in the place of the run file's.

    Raises ConfigError if a tracker is unknown or none is named, PacelineError for one that fails to the end.
    """
    directory_if_any(run)  # a run file that is none is an error, and waiting would not mend it
    if not to or project is None:
        section = load_run_config(run_file_of(run)).tracking
        to, project = to or section.to, project or section.project
    if not to:
        raise ConfigError(
            "No tracker is named.",
            next=f"paceline track {run} --to tensorboard; or tracking: {{to: [...]}} in the run file.",
        )
    trackings = [Tracking(name, TRACKERS.find(name), project) for name in dict.fromkeys(to)]
    say(out, f"{', '.join(to)}: a step appears when a checkpoint covers it. Ctrl-C ends this, not the run.")
    asked = Event()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in stop_signals()}
    try:
        looks = RunLooks(partial(directory_if_any, run))
        track(trackings, lambda: _look(looks), lambda: asked.wait(LOOK_S), partial(say, out))
    finally:
        for one in trackings:
            one.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _look(looks: RunLooks) -> Look:
    """The run is not over while the `train` that started this process lives: it may be about to go on."""
    look = looks.look()
    return replace(look, is_over=look.is_over and os.environ.get(SUPERVISOR_VARIABLE) != str(os.getppid()))


@contextmanager
def tracked(run_file: Path, config: RunConfig) -> Iterator[None]:
    """Meanwhile a process of its own sends the curves where the run file says; no role waits for it."""
    if not config.tracking.to:
        yield
        return
    for name in config.tracking.to:
        TRACKERS.find(name)
    log = config.run.directory / "logs" / "trackers.log"
    command = [sys.executable, "-m", "paceline", "track", str(run_file)]
    with os.fdopen(opened_log(log), "wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, SUPERVISOR_VARIABLE: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)
    try:
        yield
    finally:
        process.terminate()
        try:
            code = process.wait(LAST_POINTS_S)
        except subprocess.TimeoutExpired:
            say(out, f"The trackers still send the last points; see {log}")
        else:
            if code not in (0, -signal.SIGTERM):  # ended while it was starting, it had nothing yet
                say(out, f"The curves were not sent completely; see {log}. Again: paceline track {run_file}")
