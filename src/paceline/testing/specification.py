"""The ledger in plain dictionaries: the readable specification of every store's behaviour.

It has one lock, no durability and no fast operation. The conformance suite and the differential state machine
compare the SQLite store with it; the simulation runs on it, because it is easy to copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from paceline.ledger.ledger import Ledger
from paceline.ledger.records import (
    CONSUMER,
    Fence,
    Intent,
    Lease,
    Order,
    SourceBlock,
    State,
    producer_role,
)
from paceline.ledger.refusals import (
    fenced,
    late,
    other_order,
    prompts_differ,
)
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


@dataclass
class Role:
    epoch: int = 0
    last_op: int = 0
    result: Any = None


@dataclass
class Operation:
    repeated: bool
    result: Any = None
    changes: bool = True

    def keep(self, result: Any) -> Any:
        self.result = result
        return result


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


class SpecificationOfPrompts(Ledger):
    """Roles and prompts; bytes and samples are in specification_of_samples.py."""

    durable = True

    def __init__(self) -> None:
        self.rows = Rows()
        self._changed = threading.Condition(threading.RLock())

    @contextmanager
    def _mutation(self, fence: Fence | None, op: int | None = None) -> Iterator[Operation]:
        with self._changed:
            role = self.rows.roles.get(fence.role, Role()) if fence is not None else Role()
            if fence is not None and role.epoch != fence.epoch:
                raise fenced(fence, role.epoch)
            if fence is not None and op is not None and op < role.last_op:
                raise late(fence, op, role.last_op)
            repeated = op is not None and fence is not None and op == role.last_op
            operation = Operation(repeated, role.result if repeated else None)
            yield operation
            if operation.changes and not operation.repeated:
                self.rows.lsn += 1
                if fence is not None and op is not None:
                    role.last_op, role.result = op, operation.result
                self._changed.notify_all()

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

    def evict(self, fence: Fence | None, op: int | None, worker: str) -> None:
        with self._mutation(fence, op) as operation:
            if not operation.repeated:
                self._next_epoch(producer_role(worker))
                self._end_work_of(worker)

    # -- prompts ---------------------------------------------------------------------------

    def extend(self, fence: Fence | None, op: int | None, blocks: Sequence[SourceBlock]) -> int:
        with self._mutation(fence, op) as operation:
            if operation.repeated:
                return int(operation.result)
            source, before = list(self.rows.source), self.rows.num_prompts
            for block in blocks:
                known = sum(b.count for b in source)
                if block.first == known:
                    source.append(block)
                elif block not in source:
                    raise prompts_differ(block.first, before)
            new = sum(b.count for b in source) - before
            self.rows.source = source
            self.rows.closed = self.rows.closed and not new
            return int(operation.keep(new))

    def source_blocks(self, first: int = 0, limit: int | None = None) -> list[SourceBlock]:
        with self._changed:
            return [b for b in self.rows.source if b.first + b.count > first][:limit]

    def lease(
        self, fence: Fence | None, op: int | None, limit: int, group_size: int | None = None
    ) -> list[Lease]:
        with self._mutation(fence, op) as operation:
            if operation.repeated:
                return list(operation.result)
            rows = self.rows
            pending = [n for n, prompt in rows.prompts.items() if prompt.state == "pending"]
            size, others = group_size or 1, [n for n in rows.prompts if self._is_another_workers(n, fence)]
            held = {n // size for n in others}
            if rows.next_ordinal // size not in held:
                pending += range(rows.next_ordinal, rows.num_prompts)
            ordinals = sorted(n for n in pending if n // size not in held)[:limit]
            if group_size is not None:
                ordinals = [n for n in ordinals if n // group_size == ordinals[0] // group_size]
            leases = []
            for ordinal in ordinals:
                prompt = rows.prompts.setdefault(ordinal, Prompt())
                prompt.state, prompt.worker = "leased", fence.worker if fence else ""
                leases.append(Lease(ordinal, prompt.attempt, prompt.deaths))
            rows.next_ordinal = max([rows.next_ordinal, *(n + 1 for n in ordinals)])
            return list(operation.keep(leases))

    def _is_another_workers(self, ordinal: int, fence: Fence | None) -> bool:
        prompt = self.rows.prompts[ordinal]
        return prompt.state == "leased" and prompt.worker != worker_of(fence)

    def _leased_by(self, fence: Fence | None, ordinal: int) -> Prompt | None:
        prompt = self.rows.prompts.get(ordinal)
        mine = prompt is not None and prompt.state == "leased" and prompt.worker == worker_of(fence)
        return prompt if mine else None

    def fail(
        self,
        fence: Fence | None,
        op: int | None,
        ordinals: Sequence[int],
        *,
        reason: str,
        attempt_max: int | None,
    ) -> list[int]:
        with self._mutation(fence, op) as operation:
            if operation.repeated:
                return list(operation.result)
            self._revoke_intents_of(fence, ordinals)
            failed = []
            for ordinal in ordinals:
                prompt = self._leased_by(fence, ordinal)
                if prompt is None:
                    continue
                prompt.attempt, prompt.worker, prompt.reason = prompt.attempt + 1, "", reason
                final = attempt_max is None or prompt.attempt >= attempt_max
                prompt.state = "failed" if final else "pending"
                lost = [
                    s for s in self.rows.samples.values() if s.state == State.LOST and s.ordinal == ordinal
                ]
                for sample in lost if final else []:
                    if sample.acked == 2:
                        sample.state = State.RELEASED
                        prompt.state = "done"
                    else:
                        sample.state, sample.reason = State.QUARANTINED, reason
                        sample.acked, sample.step = 0, None
                if prompt.state == "failed":
                    failed.append(ordinal)
                elif prompt.state == "done":
                    self._finish_prompt(ordinal)
            return list(operation.keep(failed))

    def give_back(self, fence: Fence | None, op: int | None, ordinals: Sequence[int]) -> None:
        with self._mutation(fence, op) as operation:
            if operation.repeated:
                return
            self._revoke_intents_of(fence, ordinals)
            for ordinal in ordinals:
                if (prompt := self._leased_by(fence, ordinal)) is not None:
                    prompt.state, prompt.worker = "pending", ""

    def _revoke_intents_of(self, fence: Fence | None, ordinals: Sequence[int]) -> None:
        for generation, intent in self.rows.intents.items():
            if intent.worker == worker_of(fence) and intent.ordinal in ordinals:
                self.rows.intents[generation] = replace(intent, revoked=True)

    def end_stream(self, fence: Fence | None, op: int | None, ended: bool) -> bool:
        with self._mutation(fence, op) as operation:
            if operation.repeated:
                return bool(operation.result)
            rows = self.rows
            is_open = any(prompt.state != "failed" for prompt in rows.prompts.values())
            ends = ended and not is_open and rows.next_ordinal >= rows.num_prompts
            operation.changes = ends != rows.closed
            rows.closed = ends
            return bool(operation.keep(ends))

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


def worker_of(fence: Fence | None) -> str:
    return "" if fence is None else fence.worker
