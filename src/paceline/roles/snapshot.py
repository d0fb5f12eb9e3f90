"""One look at a run, from its ledger and its events: for `paceline status`, the supervisor and people.

Reads only, loads no torch, and works on a live, a stopped or a crashed run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.ledger.facts import COMPLETED_STEP, RUN_ID
from paceline.ledger.gate import live_holder
from paceline.ledger.store import MetadataStore
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.telemetry import read_events

ROLES = ("producer", "consumer")


@dataclass(frozen=True)
class RunSnapshot:
    """`blocked_s`: how long each role, since its last start, has waited for the other one."""

    run_id: str
    prompts: dict[str, int]
    samples_committed: int
    samples_resident: int
    samples_provisional: int
    samples_lost: int
    quarantined: dict[str, str]
    resident_bytes: int
    checkpoint_step: int | None
    completed_step: int | None
    restarts: int
    failed_prompts: dict[str, str]
    live: dict[str, int | None]  # see `live_holder`
    last_step: dict[str, Any]
    last_group: dict[str, Any]
    blocked_s: dict[str, float]
    evaluation: dict[str, Any]

    @property
    def samples_trained(self) -> int:
        """Acked, durably or not."""
        return self.samples_committed - self._waiting - len(self.quarantined)

    @property
    def is_live(self) -> bool:
        return any(holder is not None for holder in self.live.values())

    _waiting: int = 0


def open_run(directory: Path) -> SQLiteMetadataStore:
    """The ledger of a run. Raises ConfigError if there is none."""
    path = directory / "ledger.db"
    if not path.exists():
        raise ConfigError(
            f"There is no run in {directory} (no ledger.db).",
            why="A run exists from its first start on.",
            next="paceline train RUN.yaml",
        )
    return SQLiteMetadataStore(path)


def take_snapshot(directory: Path, store: MetadataStore) -> RunSnapshot:
    facts, usage = store.facts(), store.usage()
    checkpoints = store.checkpoints()
    events = {role: read_events(directory / "events" / f"{role}.jsonl", tail_bytes=1 << 16) for role in ROLES}
    step, group = _last(events["consumer"], "step"), _last(events["producer"], "group")
    report = directory / "evaluation.json"
    return RunSnapshot(
        run_id=facts.get(RUN_ID, "?"),
        prompts=store.task_counts(),
        samples_committed=store.committed_count(),
        samples_resident=usage.resident_samples,
        samples_provisional=usage.provisional_samples,
        samples_lost=len(store.lost_ids()),
        quarantined=store.quarantined(),
        resident_bytes=usage.resident_bytes,
        checkpoint_step=checkpoints[-1].step if checkpoints else None,
        completed_step=facts.get(COMPLETED_STEP),
        restarts=sum(epoch - 1 for epoch in store.role_epochs().values()),
        failed_prompts=store.failed_tasks(),
        live={role: live_holder(directory, role) for role in ROLES},
        last_step=step,
        last_group=group,
        blocked_s={role: _blocked_s(events[role]) for role in ROLES},
        evaluation=json.loads(report.read_text()) if report.exists() else {},
        _waiting=usage.waiting_samples,
    )


def _blocked_s(events: list[dict[str, Any]]) -> float:
    """Of the role's newest process: its events carry the sum so far, at most a second old."""
    for event in reversed(events):
        if "blocked_seconds" in event:
            return float(event["blocked_seconds"])
        if event.get("event") == "role_started":
            break
    return 0.0


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((event for event in reversed(events) if event.get("event") == kind), {})
