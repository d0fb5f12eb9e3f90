"""Shows a run to the user who trains it: live on a terminal, as lines in a log, once as text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from msgspec.structs import replace
from rich.console import Console
from rich.live import Live

from paceline.cli.evaluate import verdict, with_interval
from paceline.cli.plain import plain, say, table
from paceline.cli.screen import is_live, line, screen
from paceline.config.load import setting
from paceline.ledger.facts import CONFIG, ENGINE, FEATURES_LIE, TARGET_VARIES
from paceline.ledger.records import PromptCounts
from paceline.monitoring.status import status_of
from paceline.roles.plan import RunPlan
from paceline.roles.snapshot import RunSnapshot
from paceline.roles.workers import CONSUMER

LINE_EVERY_S = 15.0
HINT = "Ctrl-C stops the run in good order; the same command goes on from there."
POINTS_SHOWN = 8  # of the curve


class Progress:
    """Shows snapshots. Use it as a context manager."""

    def __init__(self, console: Console, plan: RunPlan) -> None:
        self._console = console
        self._plan = plan
        self._live = Live(console=console, auto_refresh=False) if is_live(console) else None
        self._started = time.monotonic()
        self._next_line = 0.0
        self._told: set[str] = set()

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, snapshot: RunSnapshot) -> None:
        elapsed = time.monotonic() - self._started
        for note in snapshot.notes:
            if note not in self._told:
                self._told.add(note)
                say(self._console, note)
        status = status_of(self._plan.config.run.directory, snapshot)
        status = replace(status, prompts=replace(status.prompts, planned=self._plan.num_samples))
        if self._live:
            self._live.update(screen(self._console, status, hint=HINT), refresh=True)
        elif elapsed >= self._next_line:
            self._next_line = elapsed + LINE_EVERY_S
            say(self._console, f"{_clock(elapsed)} | {line(status)}")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:d}:{int(seconds) % 60:02d}"


def _step_text(s: RunSnapshot) -> str:
    step = s.last_step
    number = step.get("step", "?")
    if "loss" not in step:
        return f"step {number}: every sample of it is in quarantine"
    estimate = step.get("acceptance_length_estimate")
    tail = f", estimated acceptance length {estimate:.2f}" if estimate is not None else ""
    return f"step {number}: loss {step['loss']:.3f}{tail}"


def _process(s: RunSnapshot, role: str) -> str:
    return "ended" if s.live[role] is None else str(s.live[role] or "running, process unknown")


def _place(told: Mapping[str, Any]) -> str:
    return f"process {told.get('pid', '?')} on host {told.get('host', '?')}"


def _prompts_text(p: PromptCounts) -> str:
    return f"{p.pending} pending, {p.leased} leased, {p.done} done, {p.failed} failed"


def _narrowed_text(s: RunSnapshot) -> str:
    recorded = s.ledger.facts.get(CONFIG)
    transfer = setting(recorded, "method.transfer") if isinstance(recorded, dict) else None
    return ", the states that the draft reads in float8" if transfer == "float8" else ""


def _shared_text(s: RunSnapshot) -> str:
    """Where hosts share the features, by the path on the host that started the run."""
    lies: dict[str, Any] = s.ledger.facts.get(FEATURES_LIE) or {}
    if "master" in lies:
        return f", in memory at the Mooncake master {lies['master']}"
    return f", in {lies['folder']}, which hosts share" if "store" in lies else ""


def _engine_text(s: RunSnapshot) -> str:
    """Which claims hold for the run's captures."""
    found = s.ledger.facts.get(ENGINE)
    if not isinstance(found, dict):
        return "not started yet"
    name = found.get("name")
    if found.get("repeats_bits") and s.ledger.facts.get(TARGET_VARIES):
        return f"{name}: a capture repeats its bits on one producer; another one's may differ in rounding"
    if found.get("repeats_bits"):
        return f"{name}: a capture repeats its bits"
    return f"{name}: bits may differ when captured again; answers are kept, tokens stay the same"


def describe(console: Console, s: RunSnapshot) -> None:
    """Print the whole state of a run, for `paceline status`."""
    shown = table("", "", title=plain(f"run {s.run_id}"), title_justify="left", show_header=False)
    state = "complete" if s.is_complete else "live" if s.is_live else "stopped"
    rows = {
        "state": state,
        **{role: _process(s, role) for role in s.live},
        **{role: str(process) for role, process in s.other_ranks.items()},
        **{role: _place(told) for role, told in s.away.items()},
        "engine": _engine_text(s),
        "prompts": _prompts_text(s.ledger.prompts),
        "samples": f"{s.ledger.committed} committed, {s.ledger.samples_trained} trained "
        f"({s.ledger.usage.provisional_samples} not yet covered by a checkpoint), "
        f"{s.ledger.lost} to capture again, {len(s.quarantined)} in quarantine",
        "features": f"{s.ledger.usage.resident_samples} samples, "
        f"{s.ledger.usage.resident_bytes / 2**20:.1f} MiB resident{_narrowed_text(s)}{_shared_text(s)}",
        "checkpoint": f"step {s.checkpoint_step}" if s.checkpoint_step is not None else "none yet",
        "last step": _step_text(s) if s.last_step else "none yet",
        **_measured(s),
        **({"waiting for": s.waits_for} if s.waits_for else {}),
        "blocked": ", ".join(
            f"{role} {seconds:.1f} s for {'samples' if role == CONSUMER else 'room'}"
            for role, seconds in s.blocked_s.items()
        )
        + " (each since its last start)",
        **({"ranks": s.ranks} if s.ranks else {}),
        "restarts": str(s.ledger.restarts),
        **({"ledger": s.ledger_at} if s.ledger_at else {}),
    }
    for name, value in rows.items():
        shown.add_row(plain(name), plain(value))
    console.print(shown)
    if s.newer_checkpoints and not s.is_live:
        say(
            console,
            f"checkpoints of later steps than the ledger knows: {', '.join(s.newer_checkpoints)}. The next "
            "start adopts those that continue the head; if it refuses, the ledger is an older copy.",
        )
    for reason in s.failed_prompts.values():
        say(console, f"failed prompt {reason}")
    for sample_id, reason in s.quarantined.items():
        say(console, f"quarantined {sample_id}: {reason}")
    if s.evaluation:
        for line in [*evaluation_lines(s), final_line(s)]:
            say(console, line)


def _measured(s: RunSnapshot) -> dict[str, str]:
    """The rows about the measured checkpoints: the best, the curve, and an early end."""
    rows = {}
    if s.best is not None:
        rows["best draft"] = f"step {s.best.step}: acceptance length {s.best.told}, exported by default"
    if len(s.curve.points) > 1:
        newest = [
            f"{point.acceptance_length:.2f} at {point.step}" for point in s.curve.points[-POINTS_SHOWN:]
        ]
        rows["curve"] = f"{len(s.curve.points)} evaluations, the last: {', '.join(newest)}"
    if s.stopped_flat:
        rows["early stop"] = s.stopped_flat
    return rows


def best_lines(s: RunSnapshot) -> list[str]:
    """What was measured before and is better than the newest, if anything was."""
    best, last = s.best, s.curve.last
    if best is None or last is None or best.step == last.step:
        return []
    told = f"step {best.step}, acceptance length {best.told}"
    return [f"the best of {len(s.curve.points)} evaluations is kept: {told}"]


def evaluation_lines(s: RunSnapshot) -> list[str]:
    """The measurements, before the line that sums them up."""
    e = s.evaluation
    lines = [f"{e['identical']} of {e['prompts']} prompts identical to plain decoding, token for token"]
    for way in [e["chain"]] if e["branching"] == 1 else [e["chain"], e]:
        lines.append(f"{_shape(way)}: {_way_text(way)}")
    lines += _lookup_lines(e)
    if told := e.get("prompts_not_measured"):
        lines.append(told)
    return lines


def _way_text(way: dict[str, Any]) -> str:
    return (
        f"acceptance length {with_interval(way, 'acceptance_length')} "
        f"({way['emitted_per_cycle']:.2f} emitted tokens a cycle), "
        f"{way['speculative_tokens_per_s']:.1f} against {way['plain_tokens_per_s']:.1f} tokens/s"
    )


def _lookup_lines(e: dict[str, Any]) -> list[str]:
    """The baseline beside the draft; none if it was not measured."""
    if "lookup" not in e:
        return []
    name = "chain" if e["branching"] == 1 else "tree"
    lookup = e["lookup"]
    return [
        f"prompt lookup of {lookup['num_draft_tokens']} tokens, no draft: {_way_text(lookup)}",
        verdict("held-out prompts", name, e["against_lookup"][name]),
    ]


def _shape(evaluation: dict[str, Any]) -> str:
    kind = "chain" if evaluation["branching"] == 1 else "tree"
    return f"{kind} of {evaluation['num_draft_tokens']} draft tokens"


def final_line(s: RunSnapshot) -> str:
    e = s.evaluation
    return (
        f"acceptance length {e['acceptance_length']:.2f} (1 + accepted / cycles) | "
        f"speed-up {e['speed_up']:.2f}x over plain decoding | {trained(s)}"
    )


def trained(s: RunSnapshot) -> str:
    return f"{s.ledger.samples_trained} samples trained | {s.ledger.restarts} restarts"
