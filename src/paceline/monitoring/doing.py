"""What a process does now, in words, by the newest events that it told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paceline.monitoring.shares import time_of
from paceline.roles.snapshot import finite_numbers, since_start
from paceline.roles.workers import SUPERVISOR, is_producer

TOLD_WITHIN_S = 3.0  # a process that waits says so once a second
FIRST_WEIGHTS = "makes the first weights"  # which takes minutes for a large target
AT_WORK = {
    "role_started": "is starting",
    "engine_ready": "prepares its prompts",
    "started": "captures",
    "group": "captures",
    "group_failed": "looks for the prompt that fails",
    "taken_over": "captures",
    "made_room": "captures",
    "finished": "has captured everything",
    "ranks": "trains",
    "first_weights": FIRST_WEIGHTS,
    "resumed": "trains",
    "step": "trains",
    "step_failed": "looks for the sample that fails",
    "quarantined": "trains",
    "waiting_for_recapture": "waits for a sample to be captured again",
    "checkpoint": "trains",
    "checkpoint_damaged": "looks for a checkpoint that is whole",
    "fall_back": "goes back to an older checkpoint",
    "rolled_forward": "catches up with its checkpoints",
}


def doing_of(role: str, events: Sequence[Mapping[str, Any]], now: float, *, is_live: bool) -> str:
    """`events`: of the role; only those of its newest process count. `now`: Unix time."""
    if role == SUPERVISOR:
        return "looks after the processes"
    newest = since_start(events)
    last = newest[-1] if newest else {}
    if not is_live:
        return _ended(last)
    kind = last.get("event")
    if kind in ("blocked", "idle") and now - (time_of(last) or 0.0) <= TOLD_WITHIN_S:
        if kind == "idle":
            return "waits for its turn"
        return f"waits for {'room' if is_producer(role) else 'samples'}"
    if kind == "server":
        return f"its server: {last.get('state', '?')}"
    if kind == "measured":
        figures = finite_numbers(last)
        return (
            f"measures {last.get('what', '')}: {figures.get('prompts', 0):.0f} of {figures.get('of', 0):.0f}"
        )
    known = [event["event"] for event in newest if event.get("event") in AT_WORK]
    return AT_WORK[known[-1]] if known else "is starting"


def _ended(last: Mapping[str, Any]) -> str:
    if last.get("event") == "error":
        return "ended with an error"
    if last.get("event") == "role_ended":
        return "was stopped" if last.get("stopped") else "is done"
    return "was killed" if last else "has not started"
