"""The moves of the ledger machine: every mutating call, with valid and with invalid arguments.

A list of small integers (`Picks`) alone decides what a move does, so that Hypothesis can shrink a failing run
and a seeded generator can drive a long one. Three producers and the consumer make the moves, in ordinal or in
arrival order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from paceline.ledger.records import (
    CONSUMER,
    Budget,
    CheckpointRecord,
    Fence,
    Order,
    SourceBlock,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
    Wanted,
    chain_of,
    producer_role,
)
from paceline.testing.ledger_machine import (
    IDS,
    NUMBERS,
    WORKERS,
    Archived,
    DisagreementError,
    LedgerTwins,
)
from paceline.testing.samples import sample_ref
from paceline.types import SampleRef

PICKS = 24  # as many as a move can ask for, and more
ROLES = (CONSUMER, *(producer_role(worker) for worker in WORKERS))


class Picks:
    """A list of integers, asked one after another."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = list(numbers)

    def below(self, end: int) -> int:
        return (self._numbers.pop(0) if self._numbers else 0) % end

    def one(self, choices: Sequence[Any]) -> Any:
        return choices[self.below(len(choices))]

    def some(self, choices: Sequence[Any], limit: int = 3) -> list[Any]:
        """Neighbours, at most `limit` of them."""
        if not choices:
            return []
        start, length = self.below(len(choices)), 1 + self.below(limit)
        return list(choices[start : start + length])

    def rarely(self) -> bool:
        return self.below(8) == 7


class LedgerMoves:
    def __init__(self, twins: LedgerTwins, order: Order = Order.ORDINAL) -> None:
        self.twins = twins
        self._order = order
        self._fences: dict[str, list[Fence]] = {role: [] for role in ROLES}
        self._ops: Counter[Fence] = Counter()
        self._past: dict[Fence, tuple[str, tuple[Any, ...], dict[str, Any], Any]] = {}
        self._finished: dict[int, list[str]] = {}
        self._archive: list[Archived] = []
        for role in ROLES:
            self._acquire(role)

    # -- arguments ---------------------------------------------------------------------------

    def _fence(self, role: str, picks: Picks) -> Fence | None:
        """The holder's; sometimes none, sometimes a stale one."""
        held = self._fences[role]
        turn = picks.below(10)
        return held[0] if turn == 9 else None if turn == 8 and self._order == Order.ARRIVAL else held[-1]

    def _producer(self, picks: Picks) -> Fence | None:
        return self._fence(producer_role(picks.one(WORKERS)), picks)

    def _consumer(self, picks: Picks) -> Fence | None:
        return self._fence(CONSUMER, picks)

    def _call(self, name: str, fence: Fence | None, *args: Any, **kwargs: Any) -> Any:
        """Under the fence's next operation number."""
        numbered = None if fence is None else fence.call(self._ops[fence] + 1)
        outcome = self.twins.call(name, numbered, *args, **kwargs)
        if outcome.error is None and fence is not None:
            self._ops[fence] += 1
            self._past[fence] = (name, args, kwargs, outcome.value)
        return outcome.value if outcome.error is None else None

    def _state(self, *states: str) -> list[str]:
        return [r.sample_id for r in self.twins.memory.find(IDS).values() if r.state in states]

    def _ref(self, number: int, fence: Fence | None, picks: Picks) -> SampleRef:
        """With the generation of its intent, one that is gone, or none."""
        ref = sample_ref(number, ordinal=number, num_bytes=100 + number)
        worker = "" if fence is None else fence.worker
        intents = [
            generation
            for generation, x in self.twins.memory.rows.intents.items()
            if x.sample_id == IDS[number] and (x.worker == worker or picks.rarely())
        ]
        turn = picks.below(8)
        if turn == 7:
            return replace(ref, generation=1 + picks.below(max(1, self.twins.history.generation)))
        if intents and turn > 0:
            return replace(ref, generation=picks.one(intents))
        return replace(ref, generation=0, ordinal=picks.one([number, number, None, number + 1]))

    def _head(self) -> CheckpointRecord | None:
        return self.twins.memory.snapshot().head

    # -- producers ---------------------------------------------------------------------------

    def extend(self, picks: Picks) -> None:
        known = self.twins.memory.source_blocks()
        size = sum(block.count for block in known)
        count = min(1 + picks.below(5), NUMBERS - size)
        new = [SourceBlock(size, count, f"digest {size} {count}")] if count > 0 else []
        blocks = picks.one([new, new, new, [*known, *new], [*known[:1], *new], list(reversed(known))])
        if picks.rarely():
            blocks = [SourceBlock(picks.below(NUMBERS), 2, "another")]
        self._call("extend", self._producer(picks), blocks)

    def forget_prompts(self, picks: Picks) -> None:
        self._call("forget_prompts", self._producer(picks))

    def lease(self, picks: Picks) -> None:
        fence = self._producer(picks)
        below = picks.below(NUMBERS) if picks.rarely() else None
        leases = self._call("lease", fence, 1 + picks.below(4), picks.one([None, None, 2, 3]), below)
        self.twins.leased(leases or [])

    def _wanted(self, picks: Picks) -> list[Wanted]:
        return [Wanted(n, IDS[n], 10 + n) for n in picks.some(list(range(NUMBERS)))]

    def reserve(self, picks: Picks) -> None:
        budget = picks.one([None, None, Budget(200), Budget(1000, 2), Budget(1000, 6)])
        generations = self._call("reserve", self._producer(picks), self._wanted(picks), budget)
        self.twins.counts["met: no room"] += generations is None
        self.twins.reserved(generations or [])

    def commit(self, picks: Picks) -> None:
        fence = self._producer(picks)
        held = sorted(self.twins.history.held)
        numbers = picks.some(list(range(NUMBERS)) if picks.rarely() or not held else held)
        self._commit(fence, [self._ref(number, fence, picks) for number in numbers if number < NUMBERS])

    def commit_again(self, picks: Picks) -> None:
        refs = [r.ref for r in self.twins.memory.find(IDS).values()]
        refs += [sample_ref(IDS.index(i), ordinal=IDS.index(i)) for i in self.twins.memory.rows.archived_ids]
        self._commit(self._producer(picks), [replace(ref, metadata={}) for ref in picks.some(refs)])

    def _commit(self, fence: Fence | None, refs: Sequence[SampleRef]) -> None:
        memory = self.twins.memory
        known, lost = set(memory.find(IDS)) | memory.rows.archived_ids, set(self._state("lost"))
        fresh = self._call("commit", fence, refs)
        for ref, is_fresh in zip(refs, fresh or [], strict=False):
            if is_fresh and ref.sample_id in known - lost:
                raise DisagreementError(f"{ref.sample_id} was known and is fresh")
            self.twins.counts["met: a lost sample captured again"] += is_fresh and ref.sample_id in lost
            known.add(ref.sample_id)
            lost.discard(ref.sample_id)

    def swept(self, picks: Picks) -> None:
        """Some revoked bytes are gone; bytes may lie there that an older copy never gave out."""
        generations = list(self.twins.memory.rows.intents)
        skip = picks.below(40) if picks.rarely() else 0
        self._call("swept", self._producer(picks), picks.some([*generations, 999]), skip)

    def fail(self, picks: Picks) -> None:
        ordinals = picks.some(sorted(self.twins.history.held) or list(range(NUMBERS)))
        how = {"failure": f"reason {picks.below(3)}", "attempt_max": picks.one([None, 1, 2, 3])}
        failed = self._call("give_back", self._producer(picks), ordinals, **how)
        self.twins.counts["met: a hole in the log"] += bool(failed)

    def give_back(self, picks: Picks) -> None:
        ordinals = picks.some(sorted(self.twins.history.held) or list(range(NUMBERS)))
        self._call("give_back", self._producer(picks), ordinals)

    def end_stream(self, picks: Picks) -> None:
        self._call("end_stream", self._producer(picks), picks.below(4) > 0)

    def report_lost(self, picks: Picks) -> None:
        ids = picks.some(IDS if picks.rarely() else self._state("present", "lost") or IDS)
        fence = self._consumer(picks) if picks.below(2) else self._producer(picks)
        self._call("report_lost", fence, ids)

    def acquire(self, picks: Picks) -> None:
        self._acquire(picks.one(ROLES))

    def _acquire(self, role: str) -> None:
        order = None if role == CONSUMER else self._order
        before = {n for n, p in self.twins.memory.rows.prompts.items() if p.state == "leased"}
        outcome = self.twins.call("acquire", role, "holder", order)
        if outcome.error is not None:
            raise DisagreementError(f"{role} cannot be acquired: {outcome.error}")
        self._fences[role].append(outcome.value)
        after = {n for n, p in self.twins.memory.rows.prompts.items() if p.state == "leased"}
        others = [f for f, (name, *_) in self._past.items() if f.role != role and name == "lease"]
        self.twins.counts["met: another worker's leases stay"] += bool(before & after) and bool(others)
        self.twins.history.held &= after

    def other_order(self, picks: Picks) -> None:
        other = Order.ARRIVAL if self._order == Order.ORDINAL else Order.ORDINAL
        self.twins.call("acquire", producer_role(picks.one(WORKERS)), "holder", other)

    # -- the consumer ------------------------------------------------------------------------

    def _plan(self, step: int, rev: int, picks: Picks) -> StepPlan:
        records = self.twins.memory.find(IDS)
        waiting = [i for i in self._state("present") if not records[i].durable]
        return StepPlan(step, tuple(picks.some(IDS if picks.rarely() else waiting)), rev)

    def begin(self, picks: Picks) -> None:
        memory = self.twins.memory
        trained = memory.snapshot().trained_step
        step = trained + 1
        turn = picks.below(8)
        if turn == 6:
            step = 1 + picks.below(step)  # replayed, or long done
        elif turn == 7:
            step += 1 + picks.below(2)
        ack = self._ack(picks) if turn in (5, 7) else None
        known = memory.step_plan(step)
        rev = (known.rev if known else 0) + (1 if picks.below(6) == 5 else 0)
        plan = self._plan(step, rev, picks)
        fence = self._consumer(picks)
        with self._acking(ack):
            self._call("plan", fence, plan, ack)
        self.twins.counts["met: an ack with the next plan"] += memory.snapshot().trained_step > trained

    def leave(self, picks: Picks) -> None:
        self._call("plan", self._consumer(picks), None)

    def ack(self, picks: Picks) -> None:
        ack = self._ack(picks)
        with self._acking(ack):
            self._call("plan", self._consumer(picks), None, ack)

    def _ack(self, picks: Picks) -> StepAck:
        """Of the next step, as a rule as its plan has it."""
        memory = self.twins.memory
        step = memory.snapshot().trained_step + (1 if not picks.rarely() else picks.below(3))
        plan = memory.step_plan(step)
        rev = (plan.rev if plan else 0) + (1 if picks.rarely() else 0)
        finished = list(plan.sample_ids) if plan else []
        if picks.below(4) == 3:
            finished = finished[1:]
        return StepAck(step, rev, tuple(finished))

    @contextmanager
    def _acking(self, ack: StepAck | None) -> Iterator[None]:
        """Remembers what the ack finished, if it is taken in the block."""
        trained = self.twins.memory.snapshot().trained_step
        yield
        if ack is not None and self.twins.memory.snapshot().trained_step == trained + 1:
            self._finished[ack.step] = list(ack.finished)

    def _first_place(self) -> int:
        """Where a consumer resumes: no sample before it is still to be trained."""
        open_ = [r.place for r in self.twins.memory.find(IDS).values() if r.step is None]
        return min(open_, default=self.twins.memory.snapshot().settled)

    def checkpoint(self, picks: Picks) -> None:
        head, memory = self._head(), self.twins.memory
        first = head.step + 1 if head else 1
        step = max(first, memory.snapshot().trained_step)
        if picks.rarely():
            step = 1 + picks.below(step + 1)
        plans = [memory.step_plan(s) for s in range(first, step + 1)]
        known = [plan for plan in plans if plan is not None]
        chain = chain_of(head.chain if head else "", known)
        chain = picks.one([chain] * 5 + ["", "wrong"])
        record = CheckpointRecord(step, f"step-{step}-{picks.below(2)}", "digest", chain, self._first_place())
        self._call("head", self._consumer(picks), record)
        if record in memory.snapshot().checkpoints and record != head:
            before = next((a.lineage for a in reversed(self._archive) if a.record == head), ())
            lineage = (*before, *(self._trained(plan) for plan in known))
            self._archive.append(Archived(record, lineage))

    def _trained(self, plan: StepPlan) -> TrainedStep:
        records, finished = self.twins.memory.find(plan.sample_ids), self._finished.get(plan.step, [])
        samples = [
            TrainedSample(r.place, i, r.ref.ordinal, i in finished)
            for i in plan.sample_ids
            if (r := records.get(i)) is not None
        ]
        return TrainedStep(plan.step, plan.rev, tuple(samples))

    def adopt_again(self, picks: Picks) -> None:
        """A checkpoint that was recorded once, of a ledger that may have forgotten it."""
        if self._archive:
            archived = picks.one(self._archive)
            head = self._head()
            lineage = [t for t in archived.lineage if t.step > (head.step if head else 0)]
            self._adopt(archived.record, lineage, picks)

    def adopt_new(self, picks: Picks) -> None:
        """A lineage that no ledger recorded, right or not."""
        head, memory = self._head(), self.twins.memory
        step, lineage, place = (head.step if head else 0), [], memory.snapshot().committed
        unknown = [n for n in range(NUMBERS) if IDS[n] not in memory.find(IDS)]
        for _ in range(1 + picks.below(2)):
            step += 1
            plan = memory.step_plan(step)
            if plan is not None and picks.below(3):
                lineage.append(self._trained(plan))
                continue
            records = memory.find(picks.some(self._state("present", "lost", "quarantined")))
            samples = [
                TrainedSample(r.place, r.sample_id, r.ref.ordinal, picks.below(4) != 3)
                for r in records.values()
            ]
            for number in unknown[: picks.below(3)]:
                at = number if self._order == Order.ORDINAL else place
                place += 1 if picks.below(5) != 4 else 2
                samples.append(TrainedSample(at, IDS[number], number, picks.below(4) != 3))
                unknown = unknown[1:]
            rev = (plan.rev if plan else 0) + picks.below(2)
            lineage.append(TrainedStep(step, rev, tuple(samples)))
        before = head.chain if head else ""
        chain = "wrong" if picks.rarely() else chain_of(before, [t.plan for t in lineage])
        record = CheckpointRecord(step, f"step-{step}-adopted", "digest", chain, self._first_place())
        self._adopt(record, lineage, picks)

    def _adopt(self, record: CheckpointRecord, lineage: list[TrainedStep], picks: Picks) -> None:
        before = self.twins.memory.snapshot().committed
        self._call("head", self._consumer(picks), record, lineage)
        entered = self.twins.memory.snapshot().committed - before
        self.twins.counts["met: a forgotten sample rolled forward"] += entered > 0
        if self._head() == record and not any(a.record == record for a in self._archive):
            self._archive.append(Archived(record, tuple(lineage)))

    def retire(self, picks: Picks) -> None:
        self._call("retire", self._consumer(picks), picks.below(4))
        self.twins.counts["met: archived samples"] += bool(self.twins.memory.rows.archived_ids)

    def fall_back(self, picks: Picks) -> None:
        steps = [c.step for c in self.twins.memory.snapshot().checkpoints]
        step = picks.one([*steps, *steps, 0])
        lost = self._call("fall_back", self._consumer(picks), step)
        self.twins.counts["met: freed samples lost by falling back"] += bool(lost)

    def quarantine(self, picks: Picks) -> None:
        ids = picks.some(IDS if picks.rarely() else self._state("present", "lost") or IDS, 2)
        step = picks.one([None, self.twins.memory.snapshot().trained_step + 1, 1])
        self._call("quarantine", self._consumer(picks), ids, step=step, reason=f"bad {picks.below(3)}")

    def release(self, picks: Picks) -> None:
        fence = self._consumer(picks)
        ids = list(self._call("release", fence, [], 1 + picks.below(6)) or [])
        if picks.rarely():
            ids = picks.some(IDS)
        self._call("release", fence, ids, picks.below(3))

    # -- in good order, so that samples come to the end of their lives --------------------------

    def capture(self, picks: Picks) -> None:
        """Lease, reserve, commit."""
        fence = self._fences[producer_role(picks.one(WORKERS))][-1]
        leases = self._call("lease", fence, 3) or []
        self.twins.leased(leases)
        numbers = [lease.ordinal for lease in leases if lease.ordinal < NUMBERS]
        wanted = [Wanted(n, IDS[n], 100 + n) for n in numbers]
        generations = self._call("reserve", fence, wanted, None) or []
        self.twins.reserved(generations)
        refs = [
            replace(sample_ref(n, ordinal=n), generation=generation)
            for n, generation in zip(numbers, generations, strict=False)
        ]
        self._commit(fence, refs[picks.below(2) :])

    def train(self, picks: Picks) -> None:
        """Begin the next step and ack it."""
        fence = self._fences[CONSUMER][-1]
        plan = self._plan(self.twins.memory.snapshot().trained_step + 1, 0, picks)
        begun = self._call("plan", fence, plan)
        if begun is not None:
            ack = StepAck(plan.step, begun.plan.rev, begun.plan.sample_ids)
            self._call("plan", fence, None, ack)
            self._finished[plan.step] = list(ack.finished)

    def cover(self, picks: Picks) -> None:
        """Checkpoint, free, forget the older checkpoints, archive."""
        fence = self._fences[CONSUMER][-1]
        self.checkpoint(Picks([]))
        freed = self._call("release", fence, [], 100) or {}
        self._call("release", fence, list(freed), 100)
        self._call("retire", fence, 1 + picks.below(3))

    # -- any role ----------------------------------------------------------------------------

    def set_facts(self, picks: Picks) -> None:
        facts = {f"fact-{picks.below(3)}": [picks.below(5), None, "x"]}
        self._call("set_facts", self._producer(picks), facts)

    def settle_facts(self, picks: Picks) -> None:
        facts: dict[str, Any] = {f"fact-{picks.below(5)}": picks.below(5), "fact-x": (1, 2)}
        self._call("set_facts", self._fence(picks.one(ROLES), picks), facts, settle=True)

    def repeat(self, picks: Picks) -> None:
        """A call whose result got lost, with the same number: the same answer, and nothing happens."""
        held = [f for f in self._past if self._fences[f.role][-1] == f]
        if held:
            fence = picks.one(held)
            name, args, kwargs, value = self._past[fence]
            lasting = self.twins.memory.rows.roles[fence.role].last_op == self._ops[fence]
            before = self.twins.memory.lsn()
            again = self.twins.call(name, fence.call(self._ops[fence]), *args, **kwargs)
            self.twins.counts["met: a call repeated"] += 1
            if lasting and (again.value != value or self.twins.memory.lsn() != before):
                raise DisagreementError(f"{name} repeated: {value} before, {again} now")

    def arrive_late(self, picks: Picks) -> None:
        """A copy of a call that was answered long ago changes nothing."""
        roles = self.twins.memory.rows.roles  # a power failure takes answered calls back
        held = [f for f in self._past if self._fences[f.role][-1] == f and roles[f.role].last_op > 1]
        if held:
            fence, before = picks.one(held), self.twins.memory.lsn()
            self.twins.call("set_facts", fence.call(1), {"late": True})
            if self.twins.memory.lsn() != before:
                raise DisagreementError("a call that arrived late changed something")

    def reopen(self, picks: Picks) -> None:
        self.twins.reopen()

    def save(self, picks: Picks) -> None:
        self.twins.save()

    def restore(self, picks: Picks) -> None:
        """The ledger goes back, its clients start anew; the checkpoints' folders stay."""
        if picks.below(2) and self.twins.restore():
            self.twins.counts["met: a ledger restored from a backup"] += 1
            self.begin_anew()

    def begin_anew(self) -> None:
        """Every process is a new one."""
        self._fences = {role: [] for role in ROLES}
        self._past, self._ops = {}, Counter()
        for role in ROLES:
            self._acquire(role)


# How often a long run takes each, so that samples get through all of their life.
WEIGHTS: dict[str, int] = {
    "capture": 8, "train": 12, "cover": 7,
    "extend": 3, "lease": 3, "reserve": 2, "swept": 1, "commit": 4, "commit_again": 2, "fail": 4,
    "give_back": 1, "end_stream": 1, "report_lost": 2, "acquire": 2, "other_order": 1,
    "begin": 5, "leave": 1, "ack": 5, "checkpoint": 3, "adopt_again": 2, "adopt_new": 2, "retire": 2,
    "fall_back": 2, "quarantine": 1, "release": 2, "set_facts": 1, "settle_facts": 1,
    "repeat": 2, "arrive_late": 1, "reopen": 1, "save": 1, "restore": 1,
    "forget_prompts": 0,  # possible before the first commit only: for short runs
}  # fmt: skip
