"""Two metadata stores side by side, the same calls on both: the specification against the other one.

`LedgerTwins.call` applies one call to the in-memory store and to the SQLite store. Results, types of
errors and everything a reader can see must agree after it, and the protocol's own invariants hold:
a released sample is durable or quarantined; a durable ack is undone by nothing but `fall_back`; seqs
have no gaps; a generation is reserved once; no prompt is leased twice; what is known is never fresh.
"""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError, PacelineError
from paceline.ledger.records import CheckpointRecord, Fence, TaskLease, TrainedStep
from paceline.ledger.store import MetadataStore
from paceline.ledger.stores.memory import InMemoryMetadataStore
from paceline.ledger.stores.sqlite import SQLiteMetadataStore, folding
from paceline.types import SampleRef

NUMBERS = 12  # sample n is that of prompt task-n; the last two prompts are never added
STEPS = 40
IDS = [f"run0:s{n}" for n in range(NUMBERS)]
TASKS = [f"task-{n}" for n in range(NUMBERS)]


class DisagreementError(AssertionError):
    """The stores disagree, or the protocol is broken."""


@contextmanager
def small_blocks(size: int) -> Iterator[None]:
    """Fold into blocks of `size` rows, so that a handful of samples makes several."""
    before = folding.BLOCK
    folding.BLOCK = size
    try:
        yield
    finally:
        folding.BLOCK = before


def observed(store: MetadataStore) -> dict[str, Any]:
    """Everything a reader can see, but for what folding leaves out of a ref."""
    log, plans = store.read_committed(0, 10 * NUMBERS), list(store.plans())
    return {
        "lsn": store.lsn(),
        "ids": store.all_committed_ids(),
        "count": store.committed_count(),
        "log": [(e.seq, e.ref.sample_id, e.ref.source_task_id, e.present, e.quarantined) for e in log],
        "records": {i: store.sample_record(i) for i in IDS},
        "is_committed": [store.is_committed(i) for i in IDS[::6]],
        "marker": store.durable_marker(),
        "usage": store.usage(),
        "task_counts": store.task_counts(),
        "failed_tasks": store.failed_tasks(),
        "plans": plans,
        "plan_of": [store.get_plan(s.step) for s in (*plans[:1], *plans[-1:])],
        "trained_step": store.trained_step(),
        "checkpoints": store.checkpoints(),
        "lost": store.lost_ids(),
        "present": store.present_generations(),
        "present_ids": store.present_ids(),
        "quarantined": store.quarantined(),
        "intents": store.intents(),
        "releasable": store.releasable(10 * NUMBERS),
        "facts": store.facts(),
        "roles": store.role_epochs(),
    }


def refs_of(store: MetadataStore) -> dict[str, SampleRef | None]:
    return {i: store.get_committed(i) for i in IDS}


def compare(expected: dict[str, Any], found: dict[str, Any], context: str) -> None:
    for name, value in expected.items():
        if found[name] != value:
            raise DisagreementError(f"{context}: {name}\n  expected {value!r}\n  found    {found[name]!r}")


def compare_refs(
    expected: dict[str, SampleRef | None], found: dict[str, SampleRef | None], context: str
) -> None:
    """Whole refs; of one that either store folded, its ids."""
    for sample_id, one in expected.items():
        other = found[sample_id]
        if one is None or other is None or (one.feature_specs and other.feature_specs):
            same = one == other
        else:
            same = (one.sample_id, one.source_task_id) == (other.sample_id, other.source_task_id)
        if not same:
            raise DisagreementError(
                f"{context}: ref of {sample_id}\n  expected {one!r}\n  found    {other!r}"
            )


@dataclass
class History:
    """What the checks need to remember of the past; goes back in time together with the stores."""

    durable: set[str] = field(default_factory=set)
    known: list[str] = field(default_factory=list)
    generation: int = 0
    held: set[str] = field(default_factory=set)
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
    """The two stores, the calls so far, and the checks after each."""

    def __init__(self, path: Path, *, fold_from: int = 1, vfs: str | None = None, **options: Any) -> None:
        self.path, self._fold_from, self._vfs = path, fold_from, vfs
        self._options = {"durability": "head", **options}
        self.memory = InMemoryMetadataStore()
        self.sqlite = self._open()
        self.history = History()
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()
        self.on_mutation: Callable[[str, dict[str, Any]], None] = lambda _name, _seen: None
        self.autocheckpoint = 1000
        self._saved: tuple[Any, History] | None = None

    def _open(self) -> SQLiteMetadataStore:
        store = SQLiteMetadataStore(self.path, vfs=self._vfs, **self._options)
        store.fold_from = self._fold_from
        return store

    def reopen(self) -> None:
        self.log.append("reopen()")
        self.sqlite.close()
        self.sqlite = self._open()
        self.checkpoint_every(self.autocheckpoint)
        self.check("reopen")

    def checkpoint_every(self, pages: int) -> None:
        """Copy the write-ahead log into the database file whenever it is `pages` long."""
        self.autocheckpoint = pages
        self.sqlite._db.execute(f"PRAGMA wal_autocheckpoint={pages}")

    def close(self) -> None:
        self.sqlite.close()

    # -- going back: a ledger restored from a backup ----------------------------------------

    def save(self) -> None:
        self.log.append("save()")
        self.sqlite.close()
        shutil.copy(self.path, self.path.with_suffix(".saved"))
        state = {k: v for k, v in vars(self.memory).items() if k != "_changed"}
        self._saved = copy.deepcopy((state, self.history))
        self.sqlite = self._open()

    def restore(self) -> bool:
        """Forget everything since `save`, as a ledger without its last transactions has."""
        if self._saved is None:
            return False
        self.log.append("restore()")
        self.sqlite.close()
        shutil.copy(self.path.with_suffix(".saved"), self.path)
        self.path.with_name(f"{self.path.name}-gate").unlink()  # it says that more had been on the disk
        self.sqlite = self._open()
        state, self.history = copy.deepcopy(self._saved)
        vars(self.memory).update(state)
        self.check("restore")
        return True

    # -- one call ---------------------------------------------------------------------------

    def call(self, name: str, *args: Any, **kwargs: Any) -> Outcome:
        """Apply the call to both stores. Raises DisagreementError if they differ in anything."""
        words = [short(a) for a in args] + [f"{k}={short(v)}" for k, v in kwargs.items() if v is not None]
        text = f"{name}({', '.join(words)})"
        self.log.append(text)
        before = self.memory.lsn()
        found = outcome(lambda: getattr(self.sqlite, name)(*args, **kwargs))
        if name == "add_tasks" and found.error is ConfigError:
            self._refused_prompts(args[0])
            return found
        expected = outcome(lambda: getattr(self.memory, name)(*args, **kwargs))
        if name == "compact" and expected.error is None:
            found = replace(found, value=expected.value)  # how much is folded is the store's own affair
        if expected != found:
            raise DisagreementError(self._told(f"{text}\n  expected {expected}\n  found    {found}"))
        if expected.error is not None and self.memory.lsn() != before:
            raise DisagreementError(self._told(f"{text} was refused and counted"))
        try:
            seen = self.check(name)
        except DisagreementError as error:
            raise DisagreementError(self._told(str(error))) from error
        if self.memory.lsn() != before:
            self.on_mutation(name, seen)
        self.counts[f"{name} {'refused' if found.error else 'done'}"] += 1
        return found

    def _refused_prompts(self, task_ids: Sequence[str]) -> None:
        """Once prompt ids are folded, a list must begin with the prompts known: a limit of the store."""
        known = list(self.memory._tasks)
        if list(task_ids[: len(known)]) == known:
            raise DisagreementError(
                self._told(f"add_tasks({task_ids}) was refused though it begins with {known}")
            )

    def _told(self, what: str) -> str:
        return what + "\nafter:\n  " + "\n  ".join(self.log)

    # -- checks -----------------------------------------------------------------------------

    def check(self, name: str) -> dict[str, Any]:
        expected = observed(self.memory)
        compare(expected, observed(self.sqlite), name)
        compare_refs(refs_of(self.memory), refs_of(self.sqlite), name)
        self._invariants(name, expected)
        return expected

    def _invariants(self, name: str, seen: dict[str, Any]) -> None:
        past = self.history
        records = [record for record in seen["records"].values() if record is not None]
        durable = {r.sample_id for r in records if r.durable}
        head = seen["checkpoints"][-1].step if seen["checkpoints"] else 0
        known: list[str] = seen["ids"]
        self._require(name == "fall_back" or past.durable <= durable, "a durable ack was undone")
        self._require(
            all(r.durable for r in records if r.state == "released"), "released without a durable ack"
        )
        self._require([seq for seq, *_ in seen["log"]] == list(range(1, len(known) + 1)), "seqs have gaps")
        self._require(known[: len(past.known)] == past.known, "the committed log changed")
        self._require(len(set(known)) == len(known) == seen["count"], "a sample is in the log twice")
        self._require(past.lsn <= seen["lsn"] <= past.lsn + 1, "lsn")
        self._require(all(seen["roles"][r] >= e for r, e in past.epochs.items()), "an epoch went back")
        self._require(seen["trained_step"] >= head, "trained step behind head")
        self._require(not set(seen["lost"]) & set(seen["present"]), "lost and resident")
        leased = {i for i, task in self.memory._tasks.items() if task.state == "leased"}
        self._require(seen["task_counts"]["leased"] == len(leased), "leases")
        past.durable, past.known, past.lsn, past.epochs = durable, known, seen["lsn"], seen["roles"]
        past.held &= leased

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise DisagreementError(f"invariant broken: {what}")

    def leased(self, leases: Sequence[TaskLease]) -> None:
        """The result of a new lease: nobody else holds one of them."""
        ids = {lease.task_id for lease in leases}
        self._require(not ids & self.history.held, f"leased twice: {ids & self.history.held}")
        self.history.held |= ids

    def reserved(self, generations: dict[str, int]) -> None:
        self._require(
            all(g > self.history.generation for g in generations.values()), "a generation came again"
        )
        self.history.generation = max([self.history.generation, *generations.values()])


@dataclass(frozen=True)
class Archived:
    """A checkpoint as its folder keeps it, with the whole lineage behind it."""

    record: CheckpointRecord
    lineage: tuple[TrainedStep, ...]
