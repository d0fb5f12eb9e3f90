"""What people see of a run: how long each side has waited for the other one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from paceline.cli.progress import Progress, best_lines, describe
from paceline.errors import LedgerError
from paceline.evaluation.curve import Point, record_point
from paceline.ledger.place import opened
from paceline.ledger.settings import SqliteSection
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles.snapshot import RunSnapshot, open_run, take_snapshot
from paceline.telemetry import EventLog


def snapshot_of(folder: Path, **events: list[tuple[str, dict[str, Any]]]) -> RunSnapshot:
    for role, written in events.items():
        log = EventLog(folder / "events" / f"{role}.jsonl")
        for event, fields in written:
            log.write(event, **fields)
        log.close()
    ledger = SQLiteLedger(folder / "ledger.db")
    snapshot = take_snapshot(folder, ledger)
    ledger.close()
    return snapshot


def plan_of(folder: Path) -> Any:
    return SimpleNamespace(num_samples=1, config=SimpleNamespace(run=SimpleNamespace(directory=folder)))


def test_both_sides_blocked_time_is_that_of_their_newest_process(tmp_path: Path) -> None:
    """Their events carry the sum so far: while they wait, and with all that they do."""
    started = ("role_started", {"pid": 1})
    step = ("step", {"step": 1, "loss": 1.0, "blocked_seconds": 41.0, "wait_seconds": 0.5})
    group, blocked = ("group", {"blocked_seconds": 90.0}), ("blocked", {"blocked_seconds": 7.0})
    snapshot = snapshot_of(
        tmp_path,
        producer=[started, group, started, blocked],
        consumer=[started, *[step] * 2000, ("checkpoint", {"step": 1})],
    )
    assert snapshot.blocked_s == {"producer": 7.0, "consumer": 41.0}
    assert snapshot_of(tmp_path, producer=[started]).blocked_s["producer"] == 0.0


def test_a_run_is_shown_in_every_place_by_the_same_figures(tmp_path: Path) -> None:
    """In status, with how long each side was blocked; in a line of a log; on a terminal as watch draws it."""
    snapshot = snapshot_of(
        tmp_path,
        producer=[("blocked", {"blocked_seconds": 7.0})],
        consumer=[("blocked", {"blocked_seconds": 41.0})],
    )
    plan = plan_of(tmp_path)
    status, log, live = (Console(width=200, force_terminal=n == 2) for n in range(3))
    with log.capture() as logged:
        Progress(log, plan).show(snapshot)
    with status.capture() as described:
        describe(status, snapshot)
    with live.capture() as shown, Progress(live, plan) as progress:
        progress.show(snapshot)
    assert "captured 0 of 1 | step 0 | " in logged.get()
    both = "producer 7.0 s for room, consumer 41.0 s for samples (each since its last start)"
    assert both in described.get()
    assert "0 of 1 captured" in shown.get()


def test_the_shown_estimate_is_the_mean_of_the_newest_steps(tmp_path: Path) -> None:
    """One step judges a few tokens only: its own figure would jump from line to line."""
    steps = [("step", {"step": n, "acceptance_length_estimate": 2.0 + n % 2}) for n in range(300)]
    snapshot = snapshot_of(tmp_path, consumer=steps)
    assert snapshot.last_step["step"] == 299
    assert snapshot.last_step["acceptance_length_estimate"] == 2.5


def test_what_the_producer_says_of_the_prompts_is_shown_once(tmp_path: Path) -> None:
    """That of its newest start, also after the looks that follow."""
    note = ("note", {"message": "2 prompts fail"})
    snapshot = snapshot_of(tmp_path, producer=[("note", {"message": "old"}), ("role_started", {}), note])
    plan = plan_of(tmp_path)
    log = Console(width=200)
    with log.capture() as logged:
        progress = Progress(log, plan)
        progress.show(snapshot)
        progress.show(snapshot)
    assert logged.get().count("2 prompts fail") == 1
    assert "old" not in logged.get()


def test_the_best_draft_the_curve_and_an_early_stop_are_shown(tmp_path: Path) -> None:
    """In status and in a line of a log; of what was measured, only what is still held can be the best."""
    ledger = SQLiteLedger(tmp_path / "ledger.db")
    ledger.set_facts(None, {"rendering_date": "today", "stopped_flat": "it rises no more"})
    ledger.close()
    for step, length in ((100, 1.4), (200, 1.7), (300, 1.6), (400, 1.5)):
        way = {"prompts": 3, "num_draft_tokens": 3, "branching": 1, "acceptance_rate": [0.5]}
        way |= {"acceptance_length": length, "emitted_per_cycle": length}
        name = f"step-{step:08d}-000001-abc"
        record_point(tmp_path, Point(step, "today", name, "m", "d", "c", {**way, "chain": way}, 100))
    (tmp_path / "checkpoints" / "best" / "step-00000300-000001-abc").mkdir(parents=True)
    snapshot = snapshot_of(tmp_path)
    plan = plan_of(tmp_path)
    status, log = (Console(width=200) for _ in range(2))
    with log.capture() as logged:
        Progress(log, plan).show(snapshot)
    with status.capture() as described:
        describe(status, snapshot)
    assert "acceptance length 1.50 at step 400 | best 1.60 at step 300" in logged.get()
    for told in (
        "step 300: acceptance length 1.60 (chain of 3), exported by default",
        "4 evaluations, the last: 1.40 at 100, 1.70 at 200, 1.60 at 300, 1.50 at 400",
        "it rises no more",
    ):
        assert told in described.get()
    assert best_lines(snapshot) == [
        "the best of 4 evaluations is kept: step 300, acceptance length 1.60 (chain of 3)"
    ]


def test_a_ledger_that_is_gone_is_to_be_put_back(tmp_path: Path) -> None:
    """The folder still tells of it. A start would refuse, too, so no verb advises one."""
    opened(SqliteSection(), tmp_path, "r").close()
    (tmp_path / "ledger.db").unlink()
    with pytest.raises(LedgerError, match=r"This is not the ledger that .*ledger.json tells of") as caught:
        open_run(tmp_path)
    assert caught.value.next.startswith("put back the ledger.db")
