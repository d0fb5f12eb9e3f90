"""The ledger in plain dictionaries: the readable specification of every store's behaviour.

It has one lock, no durability and no fast operation. The conformance suite and the differential state machine
compare the SQLite store with it; the simulation runs on it, because it is easy to copy.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from paceline.ledger.ledger import Ledger
from paceline.ledger.records import (
    CONSUMER,
    Fence,
    Lease,
    Order,
    SourceBlock,
    State,
)
from paceline.ledger.refusals import fenced, late, other_order, prompts_differ
from paceline.types import SampleRef


@dataclass
class Prompt:
    state: str = "pending"  # pending | leased | failed
    again: bool = False
    worker: str = ""
    attempt: int = 0
    deaths: int = 0
    reason: str = ""


@dataclass
class Sample:
    place: int
    ref: SampleRef
    ordinal: int | None
    state: State = State.PRESENT
    resident: bool = True
    acked: int = 0  # no; provisionally; durably
    step: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Intent:
    sample_id: str
    num_bytes: int
    ordinal: int
    worker: str
    revoked: bool = False


@dataclass
class Role:
    epoch: int = 0
    last_op: int = 0
    result: Any = None


@dataclass
class Operation:
    worker: str
    repeated: bool
    result: Any = None
    changes: bool = True


@dataclass
class Rows:
    """All of the state."""

    lsn: int = 0
    order: Order | None = None
    source: list[SourceBlock] = field(default_factory=list)
    prompts: dict[int, Prompt] = field(default_factory=dict)
    next_ordinal: int = 0
    closed: bool = False
    samples: dict[str, Sample] = field(default_factory=dict)
    committed: int = 0
    intents: dict[int, Intent] = field(default_factory=dict)
    next_generation: int = 1
    roles: dict[str, Role] = field(default_factory=dict)
    plans: dict[int, Any] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    started_step: int | None = None
    trained_step: int = 0
    checkpoints: dict[int, Any] = field(default_factory=dict)
    archive: dict[int, Any] = field(default_factory=dict)
    archived_step: int = 0
    archived_place: int = 0
    archived_ids: set[str] = field(default_factory=set)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        return sum(block.count for block in self.source)


def copied(rows: Rows) -> Rows:
    """A copy of the rows that shares the records in them that never change."""
    kept = [sample.ref for sample in rows.samples.values()]
    kept += [*rows.plans.values(), *rows.checkpoints.values(), *rows.archive.values()]
    return copy.deepcopy(rows, {id(record): record for record in kept})


S = TypeVar("S", bound="SpecificationOfPrompts")
P = ParamSpec("P")
T = TypeVar("T")


def change(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, Fence | None, P], T]:
    """Make a method one change, called with a fence first."""

    @wraps(method)
    def call(self: S, fence: Fence | None, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._mutation(fence) as operation:
            if not operation.repeated:
                operation.result = method(self, *args, **kwargs)
            result: T = copy.copy(operation.result)
            return result

    return call


class SpecificationOfPrompts(Ledger):
    """Roles and prompts; bytes and samples are in specification_of_samples.py."""

    durable = True

    def __init__(self) -> None:
        self.rows = Rows()
        self._changed = threading.Condition(threading.RLock())
        self._now = Operation("", repeated=False)

    @contextmanager
    def _mutation(self, fence: Fence | None) -> Iterator[Operation]:
        with self._changed:
            role, op = Role(), None
            if fence is not None:
                role, op = self.rows.roles.get(fence.role, role), fence.op
                if role.epoch != fence.epoch:
                    raise fenced(fence, role.epoch)
                if op is not None and op < role.last_op:
                    raise late(fence, role.last_op)
            repeated = op == role.last_op
            operation = Operation(fence.worker if fence else "", repeated, role.result if repeated else None)
            self._now = operation
            yield operation
            if operation.changes and not repeated:
                self.rows.lsn += 1
                if op is not None:
                    role.last_op, role.result = op, operation.result
                self._changed.notify_all()

    @property
    def _worker(self) -> str:
        return self._now.worker

    def _unchanged(self, result: T) -> T:
        self._now.changes = False
        return result

    # -- roles -----------------------------------------------------------------------------

    def acquire(self, role: str, holder: str, order: Order | None = None) -> Fence:
        with self._mutation(None):
            if order is not None and (settled := self._settle_order(order)) != order:
                raise other_order(settled, order)
            fence = self._next_epoch(role)
            if role == CONSUMER:
                self._begin_consumer()
            else:
                self._end_work_of(fence.worker)
            return fence

    def _settle_order(self, order: Order) -> Order:
        self.rows.order = self.rows.order or order
        return self.rows.order

    def _next_epoch(self, role: str) -> Fence:
        epoch = self.rows.roles.get(role, Role()).epoch + 1
        self.rows.roles[role] = Role(epoch)
        return Fence(role, epoch)

    def _begin_consumer(self) -> None:
        rows = self.rows
        self._undo_provisional_acks()
        rows.trained_step = max(rows.checkpoints, default=0)
        if rows.started_step is not None:
            rows.deaths[rows.started_step] = rows.deaths.get(rows.started_step, 0) + 1
            rows.started_step = None

    def _undo_provisional_acks(self) -> None:
        for sample in self.rows.samples.values():
            if sample.acked == 1:
                sample.acked, sample.step = 0, None

    def _end_work_of(self, worker: str) -> None:
        for generation, intent in self.rows.intents.items():
            if intent.worker == worker:
                self.rows.intents[generation] = replace(intent, revoked=True)
        for prompt in self.rows.prompts.values():
            if prompt.state == "leased" and prompt.worker == worker:
                prompt.state, prompt.worker, prompt.deaths = "pending", "", prompt.deaths + 1

    # -- prompts ---------------------------------------------------------------------------

    @change
    def extend(self, blocks: Sequence[SourceBlock]) -> int:
        source, before = list(self.rows.source), self.rows.num_prompts
        for block in blocks:
            if block.first == sum(b.count for b in source):
                source.append(block)
            elif block not in source:
                raise prompts_differ(block.first, before)
        new = sum(b.count for b in source) - before
        self.rows.source = source
        self.rows.closed = self.rows.closed and not new
        return new

    def source_blocks(self, first: int = 0, limit: int | None = None) -> list[SourceBlock]:
        with self._changed:
            return [b for b in self.rows.source if b.first + b.count > first][:limit]

    @change
    def forget_prompts(self) -> bool:
        rows = self.rows
        is_held = any(prompt.state != "pending" for prompt in rows.prompts.values())
        is_promised = any(not intent.revoked for intent in rows.intents.values())
        if rows.committed or is_held or is_promised or rows.plans or rows.checkpoints:
            return self._unchanged(False)
        rows.source, rows.prompts, rows.next_ordinal, rows.closed = [], {}, 0, False
        return True

    @change
    def lease(self, limit: int, group_size: int | None = None, below: int | None = None) -> list[Lease]:
        rows, size = self.rows, group_size or 1
        pending = [n for n, prompt in rows.prompts.items() if prompt.state == "pending"]
        leased = {n: prompt.worker for n, prompt in rows.prompts.items() if prompt.state == "leased"}
        held = {n // size for n, worker in leased.items() if worker != self._worker}
        if rows.next_ordinal // size not in held:
            pending += range(rows.next_ordinal, rows.num_prompts)
        if below is not None:
            pending = [n for n in pending if n < below]
        ordinals = sorted(n for n in pending if n // size not in held)[:limit]
        if not ordinals:
            return self._unchanged([])
        if group_size is not None:
            ordinals = [n for n in ordinals if n // group_size == ordinals[0] // group_size]
        leases = []
        for ordinal in ordinals:
            prompt = rows.prompts.setdefault(ordinal, Prompt())
            prompt.state, prompt.worker = "leased", self._worker
            leases.append(Lease(ordinal, prompt.attempt, prompt.deaths))
        rows.next_ordinal = max([rows.next_ordinal, *(n + 1 for n in ordinals)])
        return leases

    @change
    def give_back(
        self, ordinals: Sequence[int], *, failure: str | None = None, attempt_max: int | None = None
    ) -> list[int]:
        for generation, intent in self.rows.intents.items():
            if intent.worker == self._worker and intent.ordinal in ordinals:
                self.rows.intents[generation] = replace(intent, revoked=True)
        failed = []
        for ordinal in ordinals:
            prompt = self.rows.prompts.get(ordinal, Prompt())
            if (prompt.state, prompt.worker) != ("leased", self._worker):
                continue
            prompt.state, prompt.worker = "pending", ""
            if failure is not None:
                prompt.attempt, prompt.reason = prompt.attempt + 1, failure
                if attempt_max is None or prompt.attempt >= attempt_max:
                    prompt.state = "failed"
                    failed += self._lose_for_good(ordinal, failure)
        return failed

    def _lose_for_good(self, ordinal: int, reason: str) -> list[int]:
        for sample in self.rows.samples.values():
            if sample.ordinal == ordinal and sample.state == State.LOST:
                if sample.acked == 2:  # durable weights contain it by now
                    sample.state = State.RELEASED
                    del self.rows.prompts[ordinal]
                    return []
                sample.state, sample.reason = State.QUARANTINED, reason
                sample.acked, sample.step = 0, None
        return [ordinal]

    @change
    def end_stream(self, ended: bool) -> bool:
        rows = self.rows
        is_open = any(prompt.state != "failed" for prompt in rows.prompts.values())
        ends = ended and not is_open and rows.next_ordinal >= rows.num_prompts
        if ends == rows.closed:
            return self._unchanged(ends)
        rows.closed = ends
        return ends

    def _pass_over(self, ordinal: int) -> None:
        """The prompt counts as leased once; those before it that never were are pending."""
        for n in range(self.rows.next_ordinal, ordinal):
            self.rows.prompts[n] = Prompt()
        self.rows.next_ordinal = max(self.rows.next_ordinal, ordinal + 1)

    def _finish_prompt(self, ordinal: int | None) -> None:
        if ordinal is not None:
            self._pass_over(ordinal)
            if ordinal in self.rows.prompts and self.rows.prompts[ordinal].state != "failed":
                del self.rows.prompts[ordinal]

    def _reopen_prompt(self, ordinal: int | None) -> None:
        if ordinal is not None:
            self._pass_over(ordinal)
            self.rows.prompts.setdefault(ordinal, Prompt()).again = True

    def _settled(self) -> int:
        if self.rows.order == Order.ARRIVAL:
            return self.rows.committed
        open_ = [n for n, p in self.rows.prompts.items() if p.state != "failed" and not p.again]
        return min(open_, default=self.rows.next_ordinal)

    def failed(self, start: int = 0, stop: int | None = None) -> dict[int, str]:
        with self._changed:
            return {
                n: prompt.reason
                for n, prompt in sorted(self.rows.prompts.items())
                if prompt.state == "failed" and start <= n and (stop is None or n < stop)
            }
