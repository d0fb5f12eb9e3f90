"""Makes the same calls on the specification and on a store, and compares them.

`LedgerTwins.call` applies one call to both. Results, types of errors and everything a reader can see
must agree after it, and the protocol's own invariants hold: a released sample is durable; a durable ack
is undone by nothing but `fall_back`; a settled place never changes; a generation is reserved once; no
prompt is leased twice; an epoch never goes back.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import PacelineError
from paceline.ledger.ledger import Ledger
from paceline.ledger.records import CheckpointRecord, Fence, Lease, SampleRecord, State, TrainedStep
from paceline.testing.ledger_subjects import Subject
from paceline.testing.specification_of_steps import SpecificationLedger
from paceline.types import SampleRef

NUMBERS = 12  # sample n is that of prompt n
WORKERS = ("w0", "w1", "w2")
IDS = [f"run0:s{n}" for n in range(NUMBERS)]


class DisagreementError(AssertionError):
    """The ledgers disagree, or the protocol is broken."""


def observed(ledger: Ledger) -> dict[str, Any]:
    """Everything a reader can see."""
    return {
        "snapshot": ledger.snapshot(),
        "lsn": ledger.lsn(),
        "page": ledger.read(0, 10 * NUMBERS),
        "part": ledger.read(2, 5),
        "records": ledger.find(IDS),
        "states": {state: ledger.find(state=state, limit=9) for state in State},
        "some lost": ledger.find(IDS[:6], state=State.LOST),
        "failed": ledger.failed(),
        "some failed": ledger.failed(1, 4),
        "ownership": ledger.ownership(),
        "releasable": list(ledger.release(None, [], 10 * NUMBERS).items()),
        "history": list(ledger.history()),
        "history of a sample": list(ledger.history(sample_id=IDS[1])),
        "history of a step": list(ledger.history(step=2)),
        "plans": {step: ledger.step_plan(step) for step in range(12)},
        "source": ledger.source_blocks(),
        "last of the source": ledger.source_blocks(3, 1),
        "facts": ledger.facts(),
    }


def compare(expected: dict[str, Any], found: dict[str, Any], context: str) -> None:
    for name, value in expected.items():
        if found[name] != value:
            raise DisagreementError(f"{context}: {name}\n  expected {value!r}\n  found    {found[name]!r}")


@dataclass
class History:
    """What the checks need to remember of the past; goes back in time together with the ledgers."""

    durable: set[str] = field(default_factory=set)
    settled: list[str] = field(default_factory=list)  # by place, "" of a hole
    generation: int = 0
    held: set[int] = field(default_factory=set)  # leased prompts
    lsn: int = 0
    epochs: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    value: Any = None
    error: type[BaseException] | None = None


def outcome(call: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(call())
    except (PacelineError, TypeError) as error:
        return Outcome(error=type(error))


def short(value: Any) -> str:
    """As little as says which value it is, for the story of a failing run."""
    if isinstance(value, SampleRef):
        return f"{value.sample_id}@{value.generation}"
    if isinstance(value, Fence):
        return f"{value.role}#{value.epoch}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(short, value)) + "]"
    return repr(value)


class LedgerTwins:
    """The two ledgers, the calls so far, and the checks after each."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.memory = SpecificationLedger()
        self.memory.archive_from = subject.archive_from
        self.store = subject.open()
        self.history = History()
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()
        self._saved: tuple[Any, History] | None = None

    def reopen(self) -> None:
        self.log.append("reopen()")
        self.store.close()
        self.store = self.subject.open()
        self.check("reopen")

    def move_to(self, subject: Subject) -> None:
        """Go on with a copy of the store."""
        self.log.append("move_to()")
        self.store.close()
        self.subject, self._saved = subject, None
        self.store = subject.open()
        self.check("move_to")

    def close(self) -> None:
        self.store.close()

    # -- going back: a ledger restored from a backup ----------------------------------------

    def save(self) -> None:
        self.log.append("save()")
        self.store.close()
        self.subject.save()
        self._saved = copy.deepcopy((self.memory.rows, self.history))
        self.store = self.subject.open()

    def restore(self) -> bool:
        """Forget everything since `save`, as a ledger without its last transactions has."""
        if self._saved is None:
            return False
        self.log.append("restore()")
        self.store.close()
        self.subject.restore()
        self.store = self.subject.open()
        self.memory.rows, self.history = copy.deepcopy(self._saved)
        self.check("restore")
        return True

    # -- one call ---------------------------------------------------------------------------

    def call(self, name: str, *args: Any, **kwargs: Any) -> Outcome:
        """Apply the call to both ledgers. Raises DisagreementError if they differ in anything."""
        words = [short(a) for a in args] + [f"{k}={short(v)}" for k, v in kwargs.items() if v is not None]
        text = f"{name}({', '.join(words)})"
        self.log.append(text)
        before = self.memory.lsn()
        found = outcome(lambda: getattr(self.store, name)(*args, **kwargs))
        expected = outcome(lambda: getattr(self.memory, name)(*args, **kwargs))
        if expected != found:
            raise DisagreementError(self._told(f"{text}\n  expected {expected}\n  found    {found}"))
        if expected.error is not None and self.memory.lsn() != before:
            raise DisagreementError(self._told(f"{text} was refused and counted"))
        try:
            self.check(name)
        except DisagreementError as error:
            raise DisagreementError(self._told(str(error))) from error
        self.counts[f"{name} {'refused' if found.error else 'done'}"] += 1
        return found

    def _told(self, what: str) -> str:
        return what + "\nafter:\n  " + "\n  ".join(self.log)

    # -- checks -----------------------------------------------------------------------------

    def check(self, name: str) -> None:
        expected = observed(self.memory)
        compare(expected, observed(self.store), name)
        self._invariants(name, expected)

    def _invariants(self, name: str, seen: dict[str, Any]) -> None:
        past, snapshot = self.history, seen["snapshot"]
        records: list[SampleRecord] = list(seen["records"].values())
        durable = {r.sample_id for r in records if r.durable} | self.memory.rows.archived_ids
        head = snapshot.head.step if snapshot.head else 0
        self._require(name == "fall_back" or past.durable <= durable, "a durable ack was undone")
        self._require(
            all(r.durable for r in records if r.state == State.RELEASED), "released without a durable ack"
        )
        settled = self._settled_log(seen)
        self._require(settled[: len(past.settled)] == past.settled, "the settled log changed")
        known = [sample_id for sample_id in settled if sample_id]
        self._require(len(set(known)) == len(known), "a sample is in the log twice")
        self._require(len(records) + len(self.memory.rows.archived_ids) == snapshot.committed, "committed")
        self._require(past.lsn <= snapshot.lsn <= past.lsn + 1, "lsn")
        self._require(all(snapshot.epochs[r] >= e for r, e in past.epochs.items()), "an epoch went back")
        self._require(snapshot.trained_step >= head, "trained step behind head")
        self._require(not any(r.resident for r in records if r.state == State.LOST), "lost and resident")
        leased = {n for n, prompt in self.memory.rows.prompts.items() if prompt.state == "leased"}
        self._require(snapshot.prompts.leased == len(leased), "leases")
        past.durable, past.settled, past.lsn = durable, settled, snapshot.lsn
        past.epochs = dict(snapshot.epochs)
        past.held &= leased

    def _settled_log(self, seen: dict[str, Any]) -> list[str]:
        by_place = {entry.place: entry.sample_id for entry in seen["page"].entries}
        by_place |= {
            s.place: s.sample_id
            for trained in self.memory.rows.archive.values()
            for s in trained.samples
            if s.place >= 0
        }
        return [by_place.get(place, "") for place in range(seen["page"].settled)]

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise DisagreementError(f"invariant broken: {what}")

    def leased(self, leases: Sequence[Lease]) -> None:
        """The result of a new lease: no worker holds one of them."""
        ordinals = {lease.ordinal for lease in leases}
        self._require(not ordinals & self.history.held, f"leased twice: {ordinals & self.history.held}")
        self.history.held |= ordinals

    def reserved(self, generations: Sequence[int]) -> None:
        self._require(all(g > self.history.generation for g in generations), "a generation came again")
        self.history.generation = max([self.history.generation, *generations])


@dataclass(frozen=True)
class Archived:
    """A checkpoint as its folder keeps it, with the whole lineage behind it."""

    record: CheckpointRecord
    lineage: tuple[TrainedStep, ...]
