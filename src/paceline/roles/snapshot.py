"""RunSnapshot: a run's state at one moment, from its ledger and its events.

`paceline status` and the supervisor show it. Taking it writes nothing, loads no torch, and works on a live,
a stopped or a crashed run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.config.load import setting
from paceline.errors import ConfigError, LedgerError, PacelineError
from paceline.evaluation.curve import Curve, Point, beginning_of, read_curve
from paceline.ledger.facts import COMPLETED_STEP, CONFIG, RANKS, RUN_ID, STOPPED_FLAT, producers_in
from paceline.ledger.ledger import Ledger
from paceline.ledger.locks import live_holder
from paceline.ledger.place import FILE as PLACE
from paceline.ledger.place import known
from paceline.ledger.records import Snapshot, State
from paceline.ledger.settings import FILE, SqliteSection
from paceline.ledger.view import LedgerView
from paceline.regular_files import kind_of, read_regular
from paceline.roles.trainers import known_ranks
from paceline.roles.workers import CONSUMER, PRODUCER, elsewhere, is_producer, known_roles, role_of
from paceline.telemetry import read_events
from paceline.training.held_drafts import held_names

EVALUATION_BYTES_MAX = 1 << 20
ESTIMATE, STEPS_OF_ESTIMATE = "acceptance_length_estimate", 100
# The figures shown for each way of decoding that was measured.
MEASURED = (
    *("prompts", "identical", "num_draft_tokens", "branching"),
    *("acceptance_length", "emitted_per_cycle"),
    *("plain_tokens_per_s", "speculative_tokens_per_s", "speed_up"),
)


@dataclass(frozen=True)
class RunSnapshot:
    """`live`, `blocked_s` and `last_group` are by role: the producers first, then the consumer.

    `blocked_s`: how long each role has waited for the other side since its last start. `away`: producers on
    other hosts, with what each has told. `waits_for`: the group that training waits for, and its producer.
    `notes`: the producers' notes on the prompts since their last starts. `events`: the newest ones, by role.
    """

    ledger: Snapshot
    quarantined: dict[str, str]
    failed_prompts: dict[int, str]  # by ordinal
    live: dict[str, int | None]  # see `live_holder`
    last_step: dict[str, float]
    last_group: dict[str, dict[str, float]]
    blocked_s: dict[str, float]
    evaluation: dict[str, Any]
    newer_checkpoints: list[str]  # later than the ledger's head
    curve: Curve = field(default_factory=Curve)
    best: Point | None = None  # of the curve, among those whose drafts are kept
    notes: tuple[str, ...] = ()
    ledger_at: str = ""  # where the ledger is, if it is no file of the run's folder
    away: dict[str, dict[str, Any]] = field(default_factory=dict)
    waits_for: str = ""
    other_ranks: dict[str, int] = field(default_factory=dict)  # that train with the consumer and are live
    events: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict, repr=False)

    @property
    def run_id(self) -> str:
        return str(self.ledger.facts.get(RUN_ID, "?"))

    @property
    def checkpoint_step(self) -> int | None:
        return None if self.ledger.head is None else self.ledger.head.step

    @property
    def ranks(self) -> str:
        """How many ranks train, and when there were others; "" if there was always one."""
        changes = self.ledger.facts.get(RANKS) or []
        if not changes:
            return ""
        parts = [f"{' '.join(map(str, ranks))} from step {after + 1} on" for after, *ranks in changes]
        if len(parts) == 1:
            return parts[0]
        return f"{', '.join(parts)} (the same global batches; each change sums in another order)"

    @property
    def is_complete(self) -> bool:
        return self.ledger.facts.get(COMPLETED_STEP) is not None

    @property
    def stopped_flat(self) -> str:
        """Why training ended early; "" if it did not."""
        return str(self.ledger.facts.get(STOPPED_FLAT) or "")

    @property
    def is_live(self) -> bool:
        return bool(self.away) or any(holder is not None for holder in self.live.values())


def has_ledger(directory: Path) -> bool:
    """Whether a run has begun in this directory."""
    return (directory / PLACE).exists() or (directory / FILE).exists()


def open_run(directory: Path) -> LedgerView:
    """A read-only view of a run's ledger. Raises ConfigError if there is none, LedgerError if it is gone."""
    place = known(directory)
    if place is not None:
        return place.view(directory)
    path = directory / FILE
    if kind_of(path) != "file":
        what = "not a regular file" if kind_of(path) or path.is_symlink() or path.is_fifo() else ""
        raise ConfigError(
            f"There is no run in {directory} ({f'its ledger.db: {what}' if what else 'no ledger.db'}).",
            why="A run exists from its first start on.",
            next="paceline train RUN.yaml",
        )
    if not path.stat().st_size:
        raise ConfigError(
            f"The run in {directory} has not begun: its ledger.db is empty.",
            why="The run has written nothing to it yet, or it was emptied since.",
            next="paceline train RUN.yaml; if it had begun, restore ledger and checkpoints from one backup.",
        )
    return SqliteSection().view(directory, "")


@contextmanager
def making_sense(directory: Path) -> Iterator[None]:
    """Turn an unexpected error about the ledger's content into a LedgerError."""
    try:
        yield
    except (PacelineError, OSError):
        raise
    except Exception as error:
        raise LedgerError(
            f"The ledger in {directory} makes no sense ({type(error).__name__}: {error}).",
            why="It is damaged, or another program has written to it.",
            next=f"paceline fsck {directory} says what is wrong with it.",
        ) from error


def take_snapshot(directory: Path, ledger: Ledger | LedgerView) -> RunSnapshot:
    live = _live(directory)
    events = {role: read_events(directory / "events" / f"{role}.jsonl") for role in live}
    recent = {role: since_start(events[role]) for role in live}
    notes = [
        str(event.get("message"))
        for role in filter(is_producer, live)
        for event in recent[role]
        if event.get("event") == "note"
    ]
    now = ledger.snapshot()
    told = producers_in(now.facts)
    curve = read_curve(directory, now.facts)
    return RunSnapshot(
        ledger=now,
        quarantined={
            record.sample_id: record.reason for record in ledger.find(state=State.QUARANTINED).values()
        },
        failed_prompts=ledger.failed(),
        live=live,
        last_step=_last_step(events[CONSUMER]),
        last_group={role: _last(events[role], "group") for role in filter(is_producer, live)},
        blocked_s={role: _blocked_s(recent[role]) for role in live},
        evaluation=read_evaluation(directory, now.facts),
        newer_checkpoints=_newer(directory / "checkpoints", -1 if now.head is None else now.head.step),
        curve=curve,
        best=_best(directory, curve),
        notes=tuple(notes),
        ledger_at=_ledger_at(directory),
        away={role_of(worker): told[worker] for worker in elsewhere(now.facts, directory)},
        waits_for=_waits_for(now),
        other_ranks=_other_ranks(directory),
        events=events,
    )


def _ledger_at(directory: Path) -> str:
    place = known(directory)
    return "" if place is None or place.is_file else place.where(directory)


def _live(directory: Path) -> dict[str, int | None]:
    """Of the first producer, of every further one that is there, and of the consumer: see `live_holder`."""
    found = {role: live_holder(directory, role) for role in known_roles(directory)}
    return {
        role: holder for role, holder in found.items() if role in (PRODUCER, CONSUMER) or holder is not None
    }


def _other_ranks(directory: Path) -> dict[str, int]:
    found = {role: live_holder(directory, role) for role in known_ranks(directory)}
    return {role: holder for role, holder in found.items() if holder is not None}


def _waits_for(now: Snapshot) -> str:
    """The group at the settled prefix and its producer, by what that one has told; "" if none holds it."""
    size = setting(now.facts.get(CONFIG, {}), "capture.group_size")
    for worker, told in producers_in(now.facts).items():
        for first, held_s in told.get("holds", ()):
            if isinstance(size, int) and first <= now.settled < first + size:
                where = f"{role_of(worker)} on host {told.get('host', '?')}"
                return f"group {first // size}, held by {where} for {held_s:.0f} s"
    return ""


def _best(directory: Path, curve: Curve) -> Point | None:
    try:
        return curve.best(held_names(directory / "checkpoints"))
    except OSError:
        return None


def since_start(events: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The events of the role's newest process."""
    starts = [place for place, event in enumerate(events) if event.get("event") == "role_started"]
    return events[starts[-1] :] if starts else events


def _blocked_s(events: Sequence[Mapping[str, Any]]) -> float:
    """The newest sum, which is at most a second old."""
    return next(
        (finite_numbers(e).get("blocked_seconds", 0.0) for e in reversed(events) if "blocked_seconds" in e),
        0.0,
    )


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """The figures of the newest event of this kind."""
    return next((finite_numbers(event) for event in reversed(events) if event.get("event") == kind), {})


def _last_step(events: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of the newest step; the estimate is a mean over steps, since one step has few tokens."""
    last = _last(events, "step")
    if ESTIMATE in last:
        found = [finite_numbers(event) for event in events if event.get("event") == "step"]
        newest = [figures[ESTIMATE] for figures in found[-STEPS_OF_ESTIMATE:] if ESTIMATE in figures]
        last[ESTIMATE] = sum(newest) / len(newest)
    return last


def _newer(folder: Path, head: int) -> list[str]:
    """Names of finished checkpoints of later steps; a live run has one for a moment."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
    steps = {name: name.split("-")[1] for name in names if name.startswith("step-") and "." not in name}
    return [name for name, step in steps.items() if step.isdecimal() and int(step) > head]


def read_evaluation(directory: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of evaluation.json; {} if it is missing, has not the figures to show, or is another run's.

    `facts`: of the ledger.
    """
    try:
        found = json.loads(read_regular(directory / "evaluation.json", EVALUATION_BYTES_MAX))
        ways = [found, found["chain"]]
        if "lookup" in found:
            ways.append(found["lookup"])
            against = found["against_lookup"]["chain" if found["branching"] == 1 else "tree"]
            if not finite_numbers(against).keys() >= {"gain", "speed_ratio"}:
                return {}
        if found.get("began", beginning_of(facts)) != beginning_of(facts):
            return {}
        return found if all(finite_numbers(way).keys() >= set(MEASURED) for way in ways) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are finite numbers: a file may hold anything."""
    return {name: value for name, value in values.items() if _is_finite(value)}


def _is_finite(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer too large for a float
        return False
