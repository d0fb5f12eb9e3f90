"""A seeded history of a producer's and a consumer's ledger calls, and the whole state for a comparison.

For tests that break the file below the ledger. The calls are a function of the seed and of the ledger's
answers, so the same history can be played on any ledger.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from paceline.ledger.ledger import Ledger
from paceline.ledger.records import (
    CONSUMER,
    Fence,
    Order,
    SourceBlock,
    State,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
    Wanted,
    producer_role,
)
from paceline.testing.ledger_calls import checkpoint_of, id_of
from paceline.testing.samples import sample_ref

FINAL = {
    "acquire",
    "head",
    "fall_back",
    "retire",
    "quarantine",
    "give_back",
    "end_stream",
    "settle_facts",
}
PROMPTS = 40
WORKERS = ("a", "b", "c")
Call = tuple[str, Callable[[], Any]]


@dataclass
class History:
    """One run on `ledger`; `calls` yields the calls, to be made by the test that iterates."""

    ledger: Ledger
    rng: random.Random
    ops: Counter[str] = field(default_factory=Counter)
    fences: dict[str, Fence] = field(default_factory=dict)
    lineage: list[TrainedStep] = field(default_factory=list)

    def calls(self, count: int) -> Iterator[Call]:
        """`count` calls and a few; the first ones make the run."""
        yield "acquire", partial(self._take, CONSUMER)
        for worker in WORKERS:
            yield "acquire", partial(self._take, producer_role(worker))
        yield from self._change("extend", WORKERS[0], [SourceBlock(0, PROMPTS, "prompts")])
        moves = [self._capture, self._capture, self._train, self._train, self._cover, self._trouble]
        made = 0
        while made < count:
            for call in self.rng.choice(moves)():
                made += 1
                yield call

    def _take(self, role: str) -> None:
        order = None if role == CONSUMER else Order.ORDINAL
        self.fences[role] = self.ledger.acquire(role, "history", order)

    def _change(self, name: str, worker: str, *args: Any, **kwargs: Any) -> Iterator[Call]:
        """A change by a producer, or by the consumer (""); the answer is kept in `answer`."""
        role = producer_role(worker) if worker else CONSUMER
        self.ops[role] += 1
        op = self.ops[role]

        def call() -> None:
            self.answer = getattr(self.ledger, name)(self.fences[role].call(op), *args, **kwargs)

        self.answer = None
        yield name, call

    def _capture(self) -> Iterator[Call]:
        worker = self.rng.choice(WORKERS)
        yield from self._change("lease", worker, self.rng.randint(1, 4))
        numbers = [lease.ordinal for lease in self.answer or []]
        if not numbers:
            return
        wanted = [Wanted(n, id_of(n), 100 + n) for n in numbers]
        yield from self._change("reserve", worker, wanted, None)
        refs = [
            replace(sample_ref(n, ordinal=n), generation=generation)
            for n, generation in zip(numbers, self.answer or [], strict=False)
        ]
        if refs:
            yield from self._change("commit", worker, refs)

    def _train(self) -> Iterator[Call]:
        ledger = self.ledger
        step = ledger.snapshot().trained_step + 1
        plan = ledger.step_plan(step)
        if plan is None:
            planned = {s.sample_id for t in ledger.history() if t.step < step for s in t.samples}
            ready = [
                entry.sample_id
                for entry in ledger.read(0, PROMPTS).entries
                if entry.state == State.PRESENT and entry.sample_id not in planned
            ][: self.rng.randint(1, 3)]
            if not ready:
                return
            plan = StepPlan(step, tuple(ready))
        yield from self._change("plan", "", plan)
        yield from self._change("plan", "", None, StepAck(step, plan.rev, plan.sample_ids))

    def _cover(self) -> Iterator[Call]:
        ledger, now = self.ledger, self.ledger.snapshot()
        step, head = now.trained_step, now.head
        if step == (head.step if head else 0):
            return
        since = [
            TrainedStep(
                t.step, t.rev, tuple(TrainedSample(s.place, s.sample_id, s.ordinal, True) for s in t.samples)
            )
            for t in ledger.history()
            if (head.step if head else 0) < t.step <= step
        ]
        open_places = [e.place for e in ledger.read(0, PROMPTS).entries if e.state != State.RELEASED]
        first = min(open_places, default=now.settled)
        record = checkpoint_of(since, head.chain if head else "", first_place=first)
        yield from self._change("head", "", record)
        yield from self._change("release", "", [], 50)
        if self.answer:
            yield from self._change("release", "", list(self.answer), 50)
        yield from self._change("retire", "", 2)

    def _trouble(self) -> Iterator[Call]:
        ledger, worker = self.ledger, self.rng.choice(WORKERS)
        present = list(ledger.ownership().present)
        one = [self.rng.choice(present)] if present else []
        kind = self.rng.randrange(8)
        if kind == 0:
            yield "acquire", partial(self._renew, producer_role(worker))
        elif kind == 1:
            yield "acquire", partial(self._renew, CONSUMER)
        elif kind == 2:
            yield from self._change("report_lost", "", one)
        elif kind == 3:
            planned = {s.sample_id for t in ledger.history() for s in t.samples}
            free = [i for i in present if i not in planned][:1]
            yield from self._change("quarantine", "", free, step=None, reason="bad")
        elif kind == 4 and len(ledger.snapshot().checkpoints) > 1:
            yield from self._change("fall_back", "", ledger.snapshot().checkpoints[-2].step)
        elif kind == 5:
            yield from self._change("set_facts", "", {"n": self.rng.random()})
        elif kind == 6:
            yield from self._change("swept", worker, list(ledger.ownership().revoked))
        else:
            yield from self._change("lease", worker, 1)
            ordinals = [lease.ordinal for lease in self.answer or []]
            yield from self._change("give_back", worker, ordinals, failure="no", attempt_max=2)

    def _renew(self, role: str) -> None:
        self._take(role)
        self.ops[role] = 0


def state_of(ledger: Ledger) -> dict[str, Any]:
    """Everything that can be asked of a ledger, but its log number."""
    return {
        "snapshot": asdict(replace(ledger.snapshot(), lsn=0)),
        "page": ledger.read(0, 10_000),
        "samples": [list(ledger.find(state=state).values()) for state in State],
        "history": list(ledger.history()),
        "failed": ledger.failed(),
        "ownership": ledger.ownership(),
        "releasable": list(ledger.release(None, [], 1000).items()),
        "source": ledger.source_blocks(),
        "facts": ledger.facts(),
    }
