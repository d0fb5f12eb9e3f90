"""Keeps one command of a run going on the node where Ray has placed it. It imports no Ray.

The command is the one that a user would type there, and all guarantees are its processes' own: the kernel
asks them to stop when this process dies, and the ledger refuses a process that was replaced meanwhile.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from paceline.config.load import parse_run_config
from paceline.config.run import RunConfig
from paceline.durable_files import replace_file
from paceline.errors import PacelineError, explained
from paceline.ledger.facts import COMPLETED_STEP, FEATURES_LIE
from paceline.ledger.records import Snapshot
from paceline.placement.rules import Ends, Verdict, ended_too_often
from paceline.roles.plan import log_path
from paceline.roles.process import SUPERVISOR_VARIABLE

LINES_KEPT = 2000
LOOK_S = 0.2
PAUSE_S = 2.0  # before a command is started again
GOING_ON = "going on"
RAYS = "RAY_"  # begins the names of variables that are Ray's; the token is among them


@dataclass(frozen=True)
class Order:
    """What an actor keeps going. `what`: its name in messages; `options`: of the command, after the run file.

    `sections`: the run file that it writes to `path`; `folder`: where its relative paths begin.
    """

    what: str
    verb: str
    sections: Mapping[str, Any]
    path: str
    folder: str
    options: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        return self.verb == "train"

    @property
    def config(self) -> RunConfig:
        return parse_run_config(self.sections, source=self.path)


class Running(Protocol):
    """A command that was started: of subprocess.Popen."""

    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...


def begin(order: Order, tell: Callable[[str], None]) -> Running:
    """Start the command; its output goes to `tell`, line by line.

    Only a thread that lives as long as the command may call this: with it the kernel takes the command's
    parent for dead.
    """
    given = {name: value for name, value in os.environ.items() if not name.startswith(RAYS)}
    process = subprocess.Popen(
        [sys.executable, "-m", "paceline", order.verb, order.path, *order.options],
        env={**given, SUPERVISOR_VARIABLE: str(os.getpid()), "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def read() -> None:
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            tell(line.rstrip("\n"))

    threading.Thread(target=read, daemon=True).start()
    return process


class Keeper:
    def __init__(
        self,
        order: Order,
        *,
        begin: Callable[[Order, Callable[[str], None]], Running] = begin,
        pause_s: float = PAUSE_S,
    ) -> None:
        self.order = order
        self.config = order.config
        self._begin, self._pause_s = begin, pause_s
        self._ends = Ends(self.config.machine.restarts_max)
        self._born = secrets.token_hex(4)
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._told = 0  # lines ever
        self._lock = threading.Lock()
        self._asked = 0  # to stop
        self._wakes = threading.Event()
        self._command: Running | None = None
        self._verdict: Verdict | None = None
        self._error: PacelineError | None = None
        self._code = 0

    # -- the loop, in a thread of its own --------------------------------------------------

    def run(self) -> None:
        """Start the command, and start it again for as long as that helps."""
        try:
            verdict = self._keep()
        except Exception as error:  # noqa: BLE001 (the driver is told)
            self._error, verdict = explained(error), Verdict.FAILED
            self._code = self._error.exit_code
        self._verdict = verdict

    def _keep(self) -> Verdict:
        os.makedirs(Path(self.order.path).parent, exist_ok=True)  # noqa: PTH103
        replace_file(
            Path(self.order.path), yaml.safe_dump(dict(self.order.sections), sort_keys=False).encode()
        )
        while not self._asked:
            code = self._run_once()
            now = self.snapshot()
            if not self.order.trains and now is not None and now.facts.get(COMPLETED_STEP) is not None:
                return Verdict.DONE
            progress = None if now is None else (now.committed, [record.step for record in now.checkpoints])
            self._code = code
            verdict = self._ends.judge(
                code, trains=self.order.trains, progress=progress, stopping=self._asked > 0
            )
            if verdict is Verdict.FAILED and code < 0:
                log = str(log_path(self.config, "consumer").parent)
                self._error = ended_too_often(self.order.what, code, self._ends.count, log)
            if verdict is not Verdict.AGAIN:
                return verdict
            self.tell(f"{self.order.what} ended ({code}); it is started again")
            self._wakes.wait(self._pause_s)
        return Verdict.STOPPED

    def _run_once(self) -> int:
        with self._lock:
            if self._asked:
                return 0
            command = self._command = self._begin(self.order, self.tell)
        while (code := command.poll()) is None:
            time.sleep(LOOK_S)
        return code

    # -- what others ask -------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        return self._verdict is not None

    def tell(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)
            self._told += 1

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the command to stop at its next safe point; `at_once`: without one."""
        with self._lock:
            first, self._asked = not self._asked, self._asked + 1
            command = self._command
        self._wakes.set()
        if command is not None and command.poll() is None:
            if first:
                command.send_signal(signal.SIGTERM)
            if at_once:
                command.send_signal(signal.SIGTERM)

    def look(self, after: int) -> dict[str, Any]:
        """What it has told since line `after` (all that is kept: 0), and how it stands."""
        with self._lock:
            new = max(0, min(self._told - after, len(self._lines)))
            lines = list(self._lines)[len(self._lines) - new :]
            told = self._told
        error = self._error
        return {
            "born": self._born,
            "host": socket.gethostname(),
            "lines": lines,
            "told": told,
            "state": GOING_ON if self._verdict is None else self._verdict.value,
            "code": self._code,
            "error": None if error is None else [error.what, error.why, error.next],
        }

    def snapshot(self) -> Snapshot | None:
        """Of the run's ledger; None if it has none yet, or it does not answer."""
        try:
            with closing(self.config.view_ledger()) as ledger:
                return ledger.snapshot()
        except PacelineError:
            return None

    def takes_producers(self) -> bool:
        """Whether others may join the run."""
        now = self.snapshot()
        return now is not None and FEATURES_LIE in now.facts and now.facts.get(COMPLETED_STEP) is None
