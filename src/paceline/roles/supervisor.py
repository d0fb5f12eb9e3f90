"""Starts both roles, watches them, and starts again what was killed.

The supervisor decides nothing about samples: a role that dies, whatever it was doing, is started
again and finds its place in the ledger. It restarts after a signal or a crash, up to a limit,
and does not after a PacelineError, which a restart would only meet again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.errors import PacelineError
from paceline.ledger.facts import COMPLETED_STEP, END_OF_STREAM
from paceline.ledger.gate import UNKNOWN, live_holder
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.roles.binding import bind_run
from paceline.roles.plan import RunPlan, events_path, log_path, role_environment
from paceline.roles.process import SUPERVISOR_VARIABLE
from paceline.roles.snapshot import RunSnapshot, take_snapshot
from paceline.telemetry import read_events

LOOK_S = 0.5
GRACE_S = 300.0
PREDECESSOR_S = 120.0
OWN_EXIT_CODES = range(2, 9)


class RoleFailedError(PacelineError):
    """A role ended with an error of its own; the message is the role's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Supervisor:
    def __init__(
        self, run_file: Path, plan: RunPlan, *, show: Callable[[RunSnapshot], None] = lambda _: None
    ) -> None:
        self._run_file = run_file
        self._plan = plan
        self._config: RunConfig = plan.config
        self._show = show
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts = 0  # without progress between them
        self._progress_before: object = None
        self._stopping = 0
        self._started_at = time.time()
        self._store = SQLiteMetadataStore(self._config.ledger_path)

    def run(self) -> bool:
        """Supervise until training is complete (True) or the user stopped it (False).

        Raises the failed role's error, after the other role was stopped at a safe point.
        """
        bind_run(self._plan, self._store)
        if self._is_complete() and not self._config.feature_folder.exists():
            self._store.close()
            return True
        before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._start("producer")
            self._start("consumer")
            return self._watch()
        finally:
            self._stop_all()
            for number, handler in before.items():
                signal.signal(number, handler)
            self._store.close()

    def _watch(self) -> bool:
        while True:
            self._show(take_snapshot(self._config.run.directory, self._store))
            if self._stopping:
                return False
            for role in ("producer", "consumer"):
                if self._processes[role].poll() is not None:
                    self._look_after(role)
            if self._is_complete() and self._processes["consumer"].poll() == 0:
                return True
            self._wait_for_exit()

    def _wait_for_exit(self) -> None:
        """Sleep until the consumer ends or it is time to look again."""
        try:
            self._processes["consumer"].wait(timeout=LOOK_S)
            time.sleep(0.05)  # an ended consumer is looked at again until it is restarted or complete
        except subprocess.TimeoutExpired:
            pass

    def _is_complete(self) -> bool:
        return self._store.facts().get(COMPLETED_STEP) is not None

    def _producer_has_work(self) -> bool:
        counts = self._store.task_counts()
        return counts["pending"] + counts["leased"] > 0 or not self._store.facts().get(END_OF_STREAM)

    def _look_after(self, role: str) -> None:
        """A role ended: start it again if there is work left and the end was not its own error."""
        code = self._processes[role].returncode
        if self._is_complete() and (role == "producer" or code == 0):
            return
        if code == 0:
            if role == "consumer" or self._producer_has_work():
                self._start(role)
        elif code in OWN_EXIT_CODES:
            raise RoleFailedError(self._last_error(role), code)
        else:
            self._restart(role, code)

    def _restart(self, role: str, code: int) -> None:
        progress = self._progress()
        self._restarts = self._restarts + 1 if progress == self._progress_before else 1
        self._progress_before = progress
        if self._restarts > self._config.machine.restarts_max:
            raise PacelineError(
                f"The {role} ended {self._restarts} times (last with {code}) without any progress between.",
                why="Something kills it again and again; everything checkpointed is safe.",
                next=f"read {log_path(self._config, role)}, then run the same command again. If the kernel "
                "killed it for want of memory (dmesg tells), free some first, or start a new run with a "
                "smaller capture.group_size.",
            )
        self._start(role)

    def _progress(self) -> object:
        """What moves while a run, or the search for the sample that kills it, gets anywhere."""
        facts = self._store.facts()
        trials = {key: value["queue"] for key, value in facts.items() if key.startswith("trial.") and value}
        heads = [record.step for record in self._store.checkpoints()]
        return self._store.committed_count(), heads, trials

    def _last_error(self, role: str) -> str:
        events = read_events(events_path(self._config, role))
        errors = [e for e in events if e.get("event") == "error" and e["time"] >= self._started_at]
        if errors:
            return str(errors[-1]["message"])
        # An error before the role could report it, such as a wrong run file, is in its log alone.
        log = log_path(self._config, role).read_text(errors="replace").strip()
        return log.rpartition(f"paceline {role}: ")[2] if log else f"the {role} failed without a word"

    # -- processes -------------------------------------------------------------------------

    def _start(self, role: str) -> None:
        self._wait_for_predecessor(role)
        machine = self._config.machine
        threads = machine.producer_threads if role == "producer" else machine.consumer_threads
        environment = {**os.environ, **role_environment(threads), SUPERVISOR_VARIABLE: str(os.getpid())}
        path = log_path(self._config, role)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            self._processes[role] = subprocess.Popen(
                [sys.executable, "-m", f"paceline.roles.{role}", str(self._run_file)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which stops them in order
            )

    def _wait_for_predecessor(self, role: str) -> None:
        """A role whose supervisor was killed stops at its next safe point; give it the time."""
        deadline = time.monotonic() + PREDECESSOR_S
        while not self._stopping and time.monotonic() < deadline:
            holder = live_holder(self._config.run.directory, role)
            if holder is None or (holder != UNKNOWN and not _was_orphaned(holder)):
                return
            time.sleep(0.1)

    def _on_signal(self, *_: object) -> None:
        self._stopping += 1
        how = signal.SIGTERM if self._stopping == 1 else signal.SIGKILL
        self._send(how)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def _stop_all(self) -> None:
        self._send(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _was_orphaned(pid: int) -> bool:
    """Whether the process lives on without the supervisor that started it."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    name = f"{SUPERVISOR_VARIABLE}=".encode()
    supervisor = next((item[len(name) :].decode() for item in environment if item.startswith(name)), None)
    return supervisor is not None and not Path(f"/proc/{supervisor}").exists()
