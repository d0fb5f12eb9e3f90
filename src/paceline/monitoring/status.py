"""Computes a run's RunStatus from its ledger and its events. It writes nothing and loads no torch.

`paceline status`, `watch`, the metrics and the trackers draw what is computed here, and compute nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from paceline.config.load import setting
from paceline.evaluation.curve import Point
from paceline.ledger.facts import CONFIG, FEATURES_LIE, PROMPTS, RUN_ID
from paceline.ledger.locks import live_holder
from paceline.ledger.records import CONSUMER, producer_role
from paceline.monitoring.doing import doing_of
from paceline.monitoring.schema import (
    LISTED_MAX,
    Checkpoint,
    Evaluation,
    Features,
    Measured,
    Process,
    Prompts,
    RunStatus,
    Samples,
    Step,
)
from paceline.monitoring.shares import LEAST_S, Window
from paceline.monitoring.waiting import waiting_of
from paceline.roles.evaluation_schedule import EVALUATOR
from paceline.roles.snapshot import RunSnapshot, finite_numbers, open_run, since_start, take_snapshot
from paceline.roles.trainers import known_ranks
from paceline.roles.workers import SUPERVISOR, is_producer, worker_of
from paceline.telemetry import read_events

ESTIMATE = "acceptance_length_estimate"


def read_status(directory: Path) -> RunStatus:
    """The status of the run in `directory`. Raises ConfigError if there is none, LedgerError, OSError."""
    return status_of(directory, take_snapshot(directory, open_run(directory)))


def status_of(directory: Path, s: RunSnapshot, now: float | None = None) -> RunStatus:
    """`now`: Unix time; None: the present."""
    now = time.time() if now is None else now
    windows = {
        role: Window.of(since_start(events), _work(role), now, is_live=s.live.get(role) is not None)
        for role, events in s.events.items()
    }
    processes = [_process(s, role, windows[role], now) for role in s.live]
    producers = [one for one in processes if one.role != CONSUMER]
    consumer = next(one for one in processes if one.role == CONSUMER)
    beside, away = _beside(directory, now), [_away(s, role) for role in s.away]
    step = _step(s, windows[CONSUMER], consumer)
    state = _state(s, is_live=s.is_live or bool(beside))
    return RunStatus(
        time=round(now, 3),
        run=str(s.ledger.facts.get(RUN_ID) or setting(s.ledger.facts.get(CONFIG, {}), "run.name", "?")),
        directory=str(directory.absolute()),
        state=state,
        error=_error(s) if state == "failed" else "",
        stopped_flat=s.stopped_flat,
        ledger=s.ledger_at,
        waits_for=s.waits_for,
        ranks=s.ranks,
        lsn=s.ledger.lsn,
        restarts=s.ledger.restarts,
        seconds_left=_seconds_left(step) if state == "live" else None,
        processes=(*producers, *away, consumer, *beside),
        waiting=waiting_of(
            consumer,
            producers,
            _checkpoint_share(windows[CONSUMER]),
            all_captured=s.ledger.closed and not s.ledger.prompts.open,
        ),
        prompts=_prompts(s),
        samples=_samples(s),
        features=_features(s),
        step=step,
        checkpoint=_checkpoint(s),
        evaluation=_evaluation(s),
        failed_prompts=dict(islice(s.failed_prompts.items(), LISTED_MAX)),
        quarantined=dict(islice(s.quarantined.items(), LISTED_MAX)),
        notes=s.notes,
    )


def _state(s: RunSnapshot, *, is_live: bool) -> str:
    if s.is_complete:
        return "complete"
    return "live" if is_live else "failed" if _error(s) else "stopped"


def _error(s: RunSnapshot) -> str:
    """Of the role that ended last with one."""
    last = [events[-1] for events in s.events.values() if events]
    errors = [event for event in last if event.get("event") == "error"]
    newest = max(errors, key=lambda event: finite_numbers(event).get("time", 0.0), default={})
    return str(newest.get("message", ""))


def _work(role: str) -> str:
    """The event that tells of a role's work."""
    return "group" if is_producer(role) else "step"


# -- the processes -------------------------------------------------------------------------


def _process(s: RunSnapshot, role: str, window: Window, now: float) -> Process:
    holder = s.live[role]
    named = producer_role(worker_of(role)) if is_producer(role) else role
    return Process(
        role=role,
        state="ended" if holder is None else "live",
        pid=holder or None,
        doing=doing_of(role, s.events[role], now, is_live=holder is not None),
        starts=s.ledger.epochs.get(named, 0),
        waited_seconds=s.blocked_s[role],
        waiting_share=window.share("blocked_seconds"),
        idle_share=window.share("idle_seconds"),
        window_seconds=window.seconds,
        samples_per_second=window.rate(_work(role), "samples"),
        tokens_per_second=window.rate("group", "num_tokens") if is_producer(role) else None,
    )


def _away(s: RunSnapshot, role: str) -> Process:
    told = s.away[role]
    pid = told.get("pid")
    holds = [str(first) for first, *_ in told.get("holds", ())]
    return Process(
        role=role,
        state="elsewhere",
        pid=pid if isinstance(pid, int) else None,
        host=str(told.get("host", "?")),
        doing=f"holds the groups from prompt {', '.join(holds)}" if holds else "holds no prompts",
        starts=s.ledger.epochs.get(producer_role(worker_of(role)), 0),
    )


def _beside(directory: Path, now: float) -> list[Process]:
    """The ranks that train with the consumer, the supervisor and the evaluator, if they are live."""
    found = []
    for role in (*known_ranks(directory), EVALUATOR, SUPERVISOR):
        holder = live_holder(directory, role)
        if holder is not None:
            events = since_start(read_events(directory / "events" / f"{role}.jsonl"))
            doing = doing_of(role, events, now, is_live=True)
            found.append(Process(role=role, state="live", pid=holder or None, doing=doing))
    return found


# -- what flows ----------------------------------------------------------------------------


def _prompts(s: RunSnapshot) -> Prompts:
    counts = s.ledger.prompts
    return Prompts(
        pending=counts.pending,
        leased=counts.leased,
        done=counts.done,
        failed=counts.failed,
        planned=_planned_prompts(s.ledger.facts),
    )


def _planned_prompts(facts: Mapping[str, Any]) -> int | None:
    """Prompts x rounds. Of a mixture only the sources tell; a ledger of another program does not."""
    recorded, found = facts.get(CONFIG), facts.get(PROMPTS)
    stretches = found.get("stretches") if isinstance(found, dict) else None
    if not isinstance(stretches, list) or not stretches or not isinstance(recorded, dict):
        return None
    rounds, last = setting(recorded, "data.rounds", 1), stretches[-1]
    sound = type(last) is int and type(rounds) is int
    return last * rounds if sound else None


def _planned_steps(s: RunSnapshot) -> int | None:
    """Of a run that was never extended; else the blocks of its extensions would count, too. Where steps are
    cut by tokens it is an estimate, by the share of the run that is done."""
    facts = s.ledger.facts
    recorded, prompts = facts.get(CONFIG, {}), _planned_prompts(facts)
    if prompts is None or len(facts[PROMPTS]["stretches"]) > 1:
        return None
    batch, passes = (setting(recorded, f"training.{name}", 1) for name in ("batch_size", "passes"))
    most = setting(recorded, "training.max_steps")
    if setting(recorded, "training.tokens_per_step") is not None:
        return _estimated_steps(s.last_step, most if isinstance(most, int) else None)
    if not isinstance(batch, int) or not isinstance(passes, int) or batch < 1:
        return None
    lost = len(s.failed_prompts) * passes
    steps = math.ceil(max(0, prompts * passes - lost) / batch)
    return min(steps, most) if isinstance(most, int) else steps


def _estimated_steps(last: Mapping[str, float], most: int | None) -> int | None:
    number, share = last.get("step"), last.get("progress")
    if not number or not share:
        return most
    steps = math.ceil(number / share)
    return steps if most is None else min(steps, most)


def _samples(s: RunSnapshot) -> Samples:
    usage = s.ledger.usage
    return Samples(
        committed=s.ledger.committed,
        trained=s.ledger.samples_trained,
        provisional=usage.provisional_samples,
        waiting=usage.waiting_samples,
        lost=s.ledger.lost,
        quarantined=len(s.quarantined),
    )


def _features(s: RunSnapshot) -> Features:
    recorded = s.ledger.facts.get(CONFIG)
    settings = recorded if isinstance(recorded, dict) else {}
    budget = setting(settings, "features.budget_mib")
    place = s.ledger.facts.get(FEATURES_LIE)
    return Features(
        folder=str(place.get("folder", "")) if isinstance(place, dict) else "",
        samples=s.ledger.usage.resident_samples,
        bytes=s.ledger.usage.resident_bytes,
        reserved_bytes=s.ledger.usage.reserved_bytes,
        budget_bytes=budget << 20 if type(budget) is int else None,
        transfer=str(setting(settings, "method.transfer") or ""),
    )


def _step(s: RunSnapshot, window: Window, consumer: Process) -> Step:
    last = s.last_step
    steps, works = window.count("step"), consumer.state == "live"
    return Step(
        number=s.ledger.trained_step,
        planned=_planned_steps(s),
        loss=last.get("loss"),
        losses=_losses(s),
        acceptance_length=last.get(ESTIMATE),
        learning_rate=last.get("learning_rate"),
        grad_norm=last.get("grad_norm"),
        tokens=int(last["num_tokens"]) if "num_tokens" in last else None,
        seconds=last.get("step_seconds"),
        wait_seconds=last.get("wait_seconds"),
        per_second=steps / window.seconds if works and steps and window.seconds >= LEAST_S else None,
    )


def _losses(s: RunSnapshot) -> tuple[float, ...]:
    """A step that is trained again takes the place of all that followed it."""
    known: dict[float, float] = {}
    for event in s.events[CONSUMER]:
        figures = finite_numbers(event)
        if event.get("event") == "step" and {"step", "loss"} <= figures.keys():
            known = known if figures["step"] > max(known, default=-1) else _before(known, figures["step"])
            known[figures["step"]] = figures["loss"]
    return tuple(known.values())


def _before(known: Mapping[float, float], step: float) -> dict[float, float]:
    return {number: loss for number, loss in known.items() if number < step}


def _seconds_left(step: Step) -> float | None:
    if step.planned is None or step.per_second is None:
        return None
    return max(0, step.planned - step.number) / step.per_second


def _checkpoint(s: RunSnapshot) -> Checkpoint:
    told = [event for event in s.events[CONSUMER] if event.get("event") == "checkpoint"]
    last = finite_numbers(told[-1]) if told else {}
    return Checkpoint(
        step=s.checkpoint_step,
        kept=tuple(record.step for record in s.ledger.checkpoints),
        seconds=last.get("seconds"),
        stall_seconds=last.get("stall_seconds"),
    )


def _checkpoint_share(window: Window) -> float | None:
    if window.seconds < LEAST_S:
        return None
    return min(1.0, window.total("checkpoint", "stall_seconds") / window.seconds)


def _evaluation(s: RunSnapshot) -> Evaluation:
    return Evaluation(
        curve=tuple(map(_measured, s.curve.points)),
        best=None if s.best is None else _measured(s.best),
        speed_up=s.evaluation.get("speed_up"),
    )


def _measured(point: Point) -> Measured:
    tree = None if point.report["branching"] == 1 else float(point.report["acceptance_length"])
    return Measured(step=point.step, acceptance_length=point.acceptance_length, tree_acceptance_length=tree)
