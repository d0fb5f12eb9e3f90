"""The supervisor starts both roles, watches them, and restarts a role that dies.

It decides nothing about samples: a restarted role finds its place in the ledger. It restarts a role after a
signal, a crash or an early end, up to a limit of restarts without progress. It does not restart a role after
a PacelineError, or after the same error twice without progress. Beside them it has the newest checkpoint
measured now and then (evaluation_schedule.py), which no role waits for.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from paceline.config.run import RunConfig
from paceline.errors import FencedError, PacelineError, RanksError
from paceline.evaluation.settings import EvaluationRequest, MarkRequest
from paceline.exports.settings import ExportSection
from paceline.ledger.facts import COMPLETED_STEP, STOPPED_FLAT
from paceline.ledger.locks import RoleLock
from paceline.ledger.records import CheckpointRecord
from paceline.ledger.session import write_facts
from paceline.roles.binding import bind_run, go_on_if_flat_no_more
from paceline.roles.child import Child, RoleFailedError, end_orphan, grace_s
from paceline.roles.evaluation_schedule import BESIDE, EVALUATOR, EvaluationSchedule
from paceline.roles.feature_folder import folder_of, free_if_nothing_was_captured, take_folder
from paceline.roles.plan import RunPlan, log_path, spare_processors
from paceline.roles.process import stop_signals
from paceline.roles.snapshot import RunSnapshot, take_snapshot
from paceline.roles.target_binding import bind_target
from paceline.roles.trainer_group import TrainerGroup
from paceline.roles.trainers import known_ranks
from paceline.roles.workers import (
    CONSUMER,
    SUPERVISOR,
    is_producer,
    known_roles,
    started_roles,
    take_from_killed,
    take_from_the_dead,
)

LOOK_S = 0.5
OWN_EXIT_CODES = range(2, 9)
OUT_OF_MEMORY = (
    "if the kernel killed it for lack of memory (see dmesg), free some, or start a new run with a smaller "
    "capture.group_size; then run the same command again."
)


@dataclass(frozen=True)
class Restarts:
    """How often a role was restarted without progress; the progress and the error of the last time."""

    count: int = 0
    progress: object = None
    error: str = ""


class StopSignals:
    """While entered, Ctrl-C, SIGTERM and SIGHUP ask the children to stop; a second signal kills them."""

    def __init__(self, children: Callable[[], Sequence[Child | TrainerGroup]]) -> None:
        self.count = 0
        self._children = children
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in stop_signals():
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.count += 1
        for child in self._children():
            child.send(signal.SIGTERM if self.count == 1 else signal.SIGKILL)


class Supervisor:
    def __init__(
        self,
        run_file: Path,
        plan: RunPlan,
        *,
        show: Callable[[RunSnapshot], None] = lambda _: None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`show` receives a snapshot of the run at intervals, `tell` a message for the user at once."""
        self._run_file = run_file
        self._plan = plan
        self._config: RunConfig = plan.config
        self._show, self._tell = show, tell
        self._children: dict[str, Child | TrainerGroup] = {}
        self._restarts: dict[str, Restarts] = {}  # by role: many producers may be killed at once
        self._signals = StopSignals(lambda: list(self._children.values()))
        self._ledger = self._config.open_ledger(tell)

    def run(self) -> bool:
        """Supervise until training is complete (True) or the user stopped it (False).

        Raises the failed role's error after it has stopped the other role at a safe point; RunBusyError,
        before it starts a role, if another supervisor has the run.
        """
        with ExitStack() as held:
            held.callback(self._ledger.close)
            held.callback(RoleLock(self._config.run.directory, SUPERVISOR).release)
            held.enter_context(self._signals)
            try:
                directory = self._config.run.directory
                roles = [
                    *known_roles(directory),
                    *known_ranks(directory),
                    *started_roles(self._config),
                    EVALUATOR,
                ]
                for role in dict.fromkeys(roles):
                    end_orphan(directory, role, lambda: self._signals.count > 0)
                bind_run(self._plan, self._ledger)
                go_on_if_flat_no_more(self._config, self._ledger)
                bind_target(self._ledger, self._config)
                if self._is_complete() and not folder_of(self._config, self._ledger).exists():
                    return True
                take_from_the_dead(self._config, self._ledger)
                take_folder(self._config, self._ledger, self._tell, lambda: self._signals.count > 0)
                self._schedule = EvaluationSchedule(
                    self._config,
                    self._ledger.facts,
                    self._tell,
                    can_measure=not self._plan.evaluation_obstacle,
                )
                self._stop_early(self._schedule.stop_reason())
                for role in (*started_roles(self._config), CONSUMER):
                    self._start(role)
                return self._watch()
            finally:
                self._stop_all()
                with suppress(PacelineError):
                    free_if_nothing_was_captured(self._config, self._ledger)

    def _watch(self) -> bool:
        while True:
            self._ledger.lsn()  # refuses a ledger that was replaced while the run was going on
            now = take_snapshot(self._config.run.directory, self._ledger)
            self._show(now)
            if self._signals.count:
                self._tell("stopping at the next safe point; Ctrl-C again ends it at once")
                return False
            self._measure(now.ledger.head)
            for role, child in list(self._children.items()):
                child.keep_log_short()
                if child.poll() is not None and role != EVALUATOR:
                    self._look_after(role)
            if self._is_complete() and self._children["consumer"].poll() == 0:
                self._end_measuring()
                return True
            if self._children["consumer"].wait(LOOK_S):
                time.sleep(0.05)  # an ended consumer makes wait() return at once

    # -- the evaluation beside training ----------------------------------------------------

    def _measure(self, head: CheckpointRecord | None) -> None:
        """Look after the evaluator, and start it if the head is due and none is running."""
        evaluator = self._children.get(EVALUATOR)
        if evaluator is not None:
            code = evaluator.poll()
            if code is None:
                return
            reason = self._schedule.ended(code, evaluator.error())
            evaluator.end(time.monotonic())
            del self._children[EVALUATOR]
            self._stop_early(reason)
        if head is not None and self._schedule.is_due(head) and not self._is_complete():
            self._schedule.begun(head)
            spare = spare_processors(self._config)
            evaluator = Child(EVALUATOR, self._run_file, self._config, len(spare) or 1, BESIDE)
            evaluator.run_in_the_background(spare)
            self._children[EVALUATOR] = evaluator

    def _end_measuring(self) -> None:
        """Training is complete, and its end will be measured: a measurement still going on is left out."""
        self._measure(None)
        if EVALUATOR in self._children:
            self._tell("training is complete; the measurement that was going on beside it is left out")

    def _stop_early(self, reason: str) -> None:
        """Have the consumer end training at a checkpoint, as at the end of the stream."""
        if reason and not self._is_complete() and self._ledger.facts().get(STOPPED_FLAT) is None:
            write_facts(self._ledger, {STOPPED_FLAT: reason})
            self._tell(f"{reason}: training stops early (training.stop_when_flat)")

    # -- the roles -------------------------------------------------------------------------

    def _is_complete(self) -> bool:
        return self._ledger.facts().get(COMPLETED_STEP) is not None

    def _producer_has_work(self) -> bool:
        now = self._ledger.snapshot()
        return now.prompts.open > 0 or not now.closed

    def _look_after(self, role: str) -> None:
        """A role ended: restart it if there is work left and it did not end with its own error."""
        code = self._children[role].poll()
        if code is None or (self._is_complete() and (is_producer(role) or code == 0)):
            return
        error = self._children[role].error()
        was_replaced = code == FencedError.exit_code
        if error is not None and (code in OWN_EXIT_CODES or (was_replaced and not is_producer(role))):
            raise error  # a producer that was taken for dead comes again
        if code == 0 and role == "consumer":
            self._refuse_a_run_of_failed_prompts()
        if code not in (0, FencedError.exit_code) and is_producer(role):
            take_from_killed(self._config, self._ledger, role)
        if code != 0 or role == "consumer" or self._producer_has_work():
            self._restart(role, code, error)

    def _refuse_a_run_of_failed_prompts(self) -> None:
        prompts = self._ledger.snapshot().prompts
        if prompts.failed and prompts.failed == prompts.known:
            reason = next(iter(self._ledger.failed().values()))
            raise PacelineError(
                f"None of the {prompts.failed} prompts could be captured; the first: {reason}",
                why="There is nothing to train on.",
                next=f"paceline status {self._config.run.directory} lists them all; mend the cause and start "
                "a new run.",
            )

    def _restart(self, role: str, code: int, error: RoleFailedError | None = None) -> None:
        before, progress = self._restarts.get(role, Restarts()), self._progress()
        moves = progress != before.progress
        # A lost rank is no cause: the other ranks' words for it may be the same each time.
        says_why = error is not None and code != RanksError.exit_code
        if says_why and error is not None and error.what == before.error and not moves:
            raise error
        count = 1 if moves else before.count + 1
        self._restarts[role] = Restarts(count, progress, "" if error is None else error.what)
        if count > self._config.machine.restarts_max:
            raise error or self._restarted_too_often(role, code, count)
        self._start(role)

    def _restarted_too_often(self, role: str, code: int, count: int) -> PacelineError:
        log = f"read {log_path(self._config, self._children[role].role)}"
        ended = f"The {role} ended {count} times"
        why = "Everything that was checkpointed is safe."
        if code == 0:
            return PacelineError(
                f"{ended} without an error, and without progress in between.",
                why=f"It should end only when all its work is done. {why}",
                next=f"{log}, and paceline status {self._config.run.directory} for what is left.",
            )
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = OUT_OF_MEMORY if code == -signal.SIGKILL else "then run the same command again."
        return PacelineError(
            f"{ended} by {name}, without progress in between.",
            why=f"Something kills it at every start. {why}",
            next=f"{log}; {cause}",
        )

    def _progress(self) -> object:
        """A value that changes while a run, or an isolation in it, makes progress."""
        now = self._ledger.snapshot()
        isolations = {
            key: value["queue"] for key, value in now.facts.items() if key.startswith("isolation.") and value
        }
        heads = [record.step for record in now.checkpoints]
        return now.committed, heads, isolations, now.quarantined, now.prompts.failed

    def _start(self, role: str) -> None:
        config = self._config
        machine = config.machine
        threads = machine.producer_threads if is_producer(role) else machine.consumer_threads
        before = self._children.get(role)
        if before is not None:
            before.end(time.monotonic())
        if role == CONSUMER and machine.trainers > 1:
            self._children[role] = TrainerGroup(self._run_file, config, threads)
        else:
            self._children[role] = Child(role, self._run_file, config, threads)

    def _stop_all(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            child.send(signal.SIGTERM)
        for role, child in self._children.items():
            child.end(now + grace_s(role))


def evaluate_run(
    run_file: Path,
    config: RunConfig,
    request: EvaluationRequest | MarkRequest | None = None,
    look: Callable[[], None] = lambda: None,
) -> bool:
    """Measure a checkpoint in a process of its own; returns False if the user stopped it.

    `request`: None for the newest checkpoint on the run's held-out prompts. `look` is called now and then.
    Raises the evaluator's error.
    """
    again, asked = f"paceline evaluate {config.run.directory}", []
    if request is not None:
        again, asked = "the same command goes on after the last prompt", [request.model_dump_json()]
    return _run_alone("evaluator", "evaluation", again, run_file, config, *asked, look=look)


def export_run(run_file: Path, config: RunConfig, request: ExportSection, report: Path) -> bool:
    """Export a checkpoint in a process of its own; returns False if the user stopped it.

    `report`: a file with the run's RunReport. Raises the exporter's error.
    """
    again, asked = f"paceline export {config.run.directory}", request.model_dump_json()
    return _run_alone("exporter", "export", again, run_file, config, asked, str(report))


def export_answers_of(run_file: Path, config: RunConfig, path: Path) -> bool:
    """Write the run's kept answers to `path` in a process of its own; returns False if the user stopped it.

    Raises that process's error.
    """
    again = f"paceline data export {config.run.directory} --to {path}"
    return _run_alone(
        "answers_exporter", "export of the answers", again, run_file, config, str(path.absolute())
    )


def run_comparer(run_file: Path, config: RunConfig, look: Callable[[], None], *arguments: str) -> bool:
    """A stage of a comparison in a process of its own; `look` is called now and then meanwhile.

    Returns False if the user stopped it. Raises that process's error.
    """
    again = "the same command again, which goes on where it was"
    return _run_alone("comparer", "comparison", again, run_file, config, *arguments, look=look)


def _run_alone(
    role: str,
    work: str,
    again: str,
    run_file: Path,
    config: RunConfig,
    *arguments: str,
    look: Callable[[], None] = lambda: None,
) -> bool:
    children: list[Child] = []
    with StopSignals(lambda: children) as signals:
        end_orphan(config.run.directory, role, lambda: signals.count > 0)
        children.append(Child(role, run_file, config, len(os.sched_getaffinity(0)), *arguments))
        [child] = children
        try:
            while not child.wait(LOOK_S):
                look()
                if signals.count:
                    return False
            code, error = child.poll(), child.error()
        finally:
            child.send(signal.SIGTERM)
            child.end(time.monotonic() + grace_s(role))
    if signals.count:
        return False
    if code:
        raise error or PacelineError(
            f"The {work} was killed ({code}).",
            why="The run itself is complete and untouched.",
            next=f"{again}; {OUT_OF_MEMORY if code == -9 else ''}",
        )
    return True
