"""A seeded history of ledger calls as producers and consumers make them, and the whole state to compare.

For tests that break the file below the ledger: which calls are made is a function of the seed and of what
the ledger answers, so the same history can be played on any store.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from paceline.ledger.records import CheckpointRecord, Fence, StepAck, StepPlan, chain_of
from paceline.ledger.store import MetadataStore
from paceline.testing.samples import sample_ref

FINAL = {"acquire_role", "record_checkpoint", "fall_back", "quarantine", "fail_tasks", "adopt_checkpoint"}
Call = tuple[str, Callable[[], Any]]


@dataclass
class History:
    """One run on `store`; `calls` yields the calls, to be made by whoever iterates."""

    store: MetadataStore
    rng: random.Random
    number: int = 0
    fences: dict[str, Fence] = field(default_factory=dict)

    def calls(self, count: int) -> Iterator[Call]:
        """`count` calls and a few; the first ones make the run."""
        yield "add_tasks", lambda: self.store.add_tasks([f"task-{n}" for n in range(40)])
        for role in ("producer", "consumer"):
            yield "acquire_role", partial(self._take, role)
        moves = [self._capture, self._capture, self._train, self._train, self._cover, self._trouble]
        made = 0
        while made < count:
            for call in self.rng.choice(moves)():
                made += 1
                yield call

    def _take(self, role: str) -> None:
        self.fences[role] = self.store.acquire_role(role, "history")

    def _op(self) -> str:
        self.number += 1
        return f"op-{self.number}"

    def _capture(self) -> Iterator[Call]:
        store, fence = self.store, self.fences["producer"]
        leases: list[Any] = []
        op = self._op()
        yield (
            "lease_tasks",
            lambda: leases.extend(store.lease_tasks("w", self.rng.randint(1, 4), fence=fence, op_id=op)),
        )
        if not leases:
            return
        numbers = [int(lease.task_id.removeprefix("task-")) for lease in leases]
        sizes = {f"run0:s{n}": 100 + n for n in numbers}
        generations: dict[str, int] = {}
        op = self._op()
        yield "reserve", lambda: generations.update(store.reserve(sizes, fence=fence, op_id=op))
        refs = [replace(sample_ref(n), generation=generations[f"run0:s{n}"]) for n in numbers]
        op = self._op()
        yield "commit_samples", lambda: store.commit_samples(refs, fence=fence, op_id=op)

    def _train(self) -> Iterator[Call]:
        store, fence = self.store, self.fences["consumer"]
        step = store.trained_step() + 1
        plan = store.get_plan(step)
        if plan is None:
            trained = {i for known in store.plans() if known.step < step for i in known.sample_ids}
            ready = [
                e.ref.sample_id
                for e in store.read_committed(0, 1000)
                if e.present and not e.quarantined and e.ref.sample_id not in trained
            ][: self.rng.randint(1, 3)]
            if not ready:
                return
            plan = StepPlan(step, tuple(ready), store.committed_count())
        begun = plan
        op, ack = self._op(), self._op()
        yield "begin_step", lambda: store.begin_step(begun, fence=fence, op_id=op)
        yield (
            "ack_step",
            lambda: store.ack_step(StepAck(step, begun.rev, begun.sample_ids), fence=fence, op_id=ack),
        )

    def _cover(self) -> Iterator[Call]:
        store, fence = self.store, self.fences["consumer"]
        step, heads = store.trained_step(), store.checkpoints()
        head = heads[-1] if heads else None
        if step == (head.step if head else 0):
            return
        since = [plan for plan in store.plans() if (head.step if head else 0) < plan.step <= step]
        chain = chain_of(head.chain if head else "", since)
        record = CheckpointRecord(step, f"step-{step}", f"digest-{step}", since[-1].last_seq, chain)
        yield "record_checkpoint", lambda: store.record_checkpoint(record, fence=fence)
        freed: list[str] = []
        yield (
            "begin_release",
            lambda: freed.extend(store.begin_release(50, fence=fence)),
        )
        yield "record_released", lambda: store.record_released(freed, fence=fence)
        for old in store.checkpoints()[:-2]:
            yield "forget_checkpoint", partial(store.forget_checkpoint, old.step, fence=fence)
        yield "compact", lambda: store.compact(fence=fence)

    def _trouble(self) -> Iterator[Call]:
        store, consumer = self.store, self.fences["consumer"]
        present = store.present_ids()
        one = [self.rng.choice(present)] if present else []
        kind = self.rng.randrange(7)
        if kind == 0:
            yield "acquire_role", lambda: self._take("producer")
        elif kind == 1:
            yield "acquire_role", lambda: self._take("consumer")
        elif kind == 2:
            yield "report_lost", lambda: store.report_lost(one, fence=consumer)
        elif kind == 3:
            planned = {i for p in store.plans() for i in p.sample_ids}
            free = [i for i in present if i not in planned][:1]
            yield "quarantine", lambda: store.quarantine(free, step=None, reason="poison", fence=consumer)
        elif kind == 4 and len(store.checkpoints()) > 1:
            before = store.checkpoints()[-2].step
            yield "fall_back", lambda: store.fall_back(before, fence=consumer)
        elif kind == 5:
            yield "set_facts", lambda: store.set_facts({"n": self.rng.random()}, fence=consumer)
        else:
            leases: list[Any] = []
            fence = self.fences["producer"]
            yield "lease_tasks", lambda: leases.extend(store.lease_tasks("w", 1, fence=fence))
            ids = [lease.task_id for lease in leases]
            yield (
                "fail_tasks",
                lambda: store.fail_tasks("w", ids, reason="no", attempt_max=2, fence=fence),
            )


def state_of(store: MetadataStore) -> dict[str, Any]:
    """Everything that can be asked of a ledger, but its log number."""
    marker = store.durable_marker()
    entries = store.read_committed(0, 10_000)
    return {
        "ids": store.all_committed_ids(),
        "log": [(e.seq, e.ref.sample_id, e.present, e.quarantined) for e in entries],
        "marker": (sorted(marker["acked"]), marker["global_step"], marker["optimizer_durable"]),
        "records": [store.sample_record(e.ref.sample_id) for e in entries],
        "usage": store.usage(),
        "tasks": store.task_counts(),
        "failed": store.failed_tasks(),
        "plans": list(store.plans()),
        "trained": store.trained_step(),
        "heads": store.checkpoints(),
        "present": store.present_generations(),
        "lost": store.lost_ids(),
        "quarantined": store.quarantined(),
        "intents": store.intents(),
        "releasable": store.releasable(1000),
        "facts": store.facts(),
        "epochs": store.role_epochs(),
    }
