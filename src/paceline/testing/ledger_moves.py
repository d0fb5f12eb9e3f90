"""The moves of the ledger machine: every mutating call, with sensible and with senseless arguments.

A move takes a list of small integers (`Picks`) and nothing else decides what it does, so that
Hypothesis can shrink a failing run and a seeded generator can drive a long one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from paceline.ledger.records import (
    CheckpointRecord,
    Fence,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
    chain_of,
)
from paceline.testing.ledger_machine import (
    IDS,
    NUMBERS,
    TASKS,
    Archived,
    DisagreementError,
    LedgerTwins,
    small_blocks,
)
from paceline.testing.samples import sample_ref
from paceline.types import SampleRef

PICKS = 24  # as many as a move can ask for, and more
ADDED = NUMBERS - 2  # prompts that are ever added; samples of the others have no prompt on record


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
    def __init__(self, twins: LedgerTwins) -> None:
        self.twins = twins
        self._fences: dict[str, list[Fence]] = {"producer": [], "consumer": []}
        self._ops = 0
        self._past: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        self._finished: dict[int, list[str]] = {}
        self._archive: list[Archived] = []

    # -- arguments ---------------------------------------------------------------------------

    def _fence(self, role: str, picks: Picks) -> Fence | None:
        """The holder's; sometimes none, sometimes a stale one."""
        held = self._fences[role]
        if not held:
            return None
        turn = picks.below(10)
        return held[0] if turn == 9 else None if turn == 8 else held[-1]

    def _call(self, name: str, *args: Any, op: bool = False, **kwargs: Any) -> Any:
        if op:
            self._ops += 1
            kwargs["op_id"] = f"op-{self._ops}"
        outcome = self.twins.call(name, *args, **kwargs)
        if op and outcome.error is None:
            self._past = [*self._past[-9:], (name, args, kwargs, outcome.value)]
        return outcome.value if outcome.error is None else None

    def _state(self, *states: str) -> list[str]:
        records = [self.twins.memory.sample_record(i) for i in self.twins.memory.all_committed_ids()]
        return [r.sample_id for r in records if r is not None and r.state in states]

    def _ref(self, number: int, picks: Picks) -> SampleRef:
        """With no generation, that of its intent, or one that is gone."""
        intents = [x.generation for x in self.twins.memory.intents() if x.sample_id == IDS[number]]
        turn = picks.below(8)
        if turn == 7:
            return replace(
                sample_ref(number), generation=1 + picks.below(max(1, self.twins.history.generation))
            )
        if intents and turn > 1:
            return replace(sample_ref(number), generation=picks.one(intents))
        return replace(sample_ref(number, num_bytes=100 + number), generation=0)

    def _head(self) -> CheckpointRecord | None:
        records = self.twins.memory.checkpoints()
        return records[-1] if records else None

    # -- the producer ------------------------------------------------------------------------

    def add_tasks(self, picks: Picks) -> None:
        known = list(self.twins.memory._tasks)
        new = [t for t in TASKS[:ADDED] if t not in known][: 1 + picks.below(6)]
        chosen = picks.some(TASKS[:ADDED], 6) if picks.rarely() else known + new
        self._call("add_tasks", chosen, fence=self._fence("producer", picks))

    def lease(self, picks: Picks) -> None:
        leases = self._call(
            "lease_tasks",
            f"w{picks.below(2)}",
            1 + picks.below(4),
            group_size=picks.one([None, None, 2, 3]),
            fence=self._fence("producer", picks),
            op=True,
        )
        self.twins.leased(leases or [])

    def reserve(self, picks: Picks) -> None:
        sizes = {i: 10 + n for n, i in enumerate(picks.some(IDS))}
        generations = self._call("reserve", sizes, fence=self._fence("producer", picks), op=True)
        self.twins.reserved(generations or {})

    def revoke(self, picks: Picks) -> None:
        generations = [x.generation for x in self.twins.memory.intents()]
        self._call("revoke", picks.some([*generations, 999]), fence=self._fence("producer", picks))

    def commit(self, picks: Picks) -> None:
        held = [TASKS.index(t) for t in sorted(self.twins.history.held)]
        numbers = picks.some(list(range(NUMBERS)) if picks.rarely() or not held else held)
        refs = [self._ref(number, picks) for number in numbers]
        self._commit(refs, fence=self._fence("producer", picks), op=picks.below(2) == 1)

    def commit_again(self, picks: Picks) -> None:
        refs = [self.twins.memory.get_committed(i) for i in self.twins.memory.all_committed_ids()]
        chosen = [sample_ref(IDS.index(r.sample_id)) if not r.feature_specs else r for r in refs if r]
        self._commit(picks.some(chosen), fence=self._fence("producer", picks))

    def _commit(self, refs: Sequence[SampleRef], **kwargs: Any) -> None:
        memory = self.twins.memory
        known, lost = set(memory.all_committed_ids()), set(memory.lost_ids())
        fresh = self._call("commit_samples", refs, **kwargs)
        for ref, is_fresh in zip(refs, fresh or [], strict=False):
            if is_fresh and ref.sample_id in known - lost:
                raise DisagreementError(f"{ref.sample_id} was known and is fresh")
            self.twins.counts["met: a lost sample captured again"] += is_fresh and ref.sample_id in lost
            known.add(ref.sample_id)
            lost.discard(ref.sample_id)

    def skip(self, picks: Picks) -> None:
        """Bytes of generations lie there that an older copy of the ledger never gave out."""
        if fence := self._fence("producer", picks):
            self._call("skip_generations", picks.below(40), fence=fence)

    def fail(self, picks: Picks) -> None:
        self._call(
            "fail_tasks",
            f"w{picks.below(2)}",
            picks.some(sorted(self.twins.history.held) or TASKS),
            reason=f"reason {picks.below(3)}",
            attempt_max=picks.one([None, 1, 2, 3]),
            fence=self._fence("producer", picks),
        )

    def give_back(self, picks: Picks) -> None:
        tasks = picks.some(sorted(self.twins.history.held) or TASKS)
        self._call("return_tasks", f"w{picks.below(2)}", tasks, fence=self._fence("producer", picks))

    def report_lost(self, picks: Picks) -> None:
        ids = picks.some(IDS if picks.rarely() else self._state("present", "lost") or IDS)
        self._call("report_lost", ids, fence=self._fence(picks.one(["producer", "consumer"]), picks))

    def acquire(self, picks: Picks) -> None:
        role = picks.one(["producer", "consumer"])
        fence = self._call("acquire_role", role, f"holder-{picks.below(9)}")
        self._fences[role].append(fence)
        if role == "producer":
            self.twins.history.held.clear()

    # -- the consumer ------------------------------------------------------------------------

    def _plan(self, step: int, rev: int, picks: Picks) -> StepPlan:
        memory = self.twins.memory
        waiting = [i for i in self._state("present") if not memory.sample_record(i).durable]  # type: ignore[union-attr]
        ids = tuple(picks.some(IDS if picks.rarely() else waiting))
        return StepPlan(step, ids, memory.committed_count(), rev)

    def begin(self, picks: Picks) -> None:
        memory = self.twins.memory
        step = memory.trained_step() + 1
        turn = picks.below(8)
        if turn == 6:
            step = 1 + picks.below(step)  # replayed, or long done
        elif turn == 7:
            step += 1 + picks.below(2)
        ack = self._ack(picks) if turn in (5, 7) else None
        known = memory.get_plan(step)
        rev = (known.rev if known else 0) + (1 if picks.below(6) == 5 else 0)
        plan = self._plan(step, rev, picks)
        fence, op, trained = self._fence("consumer", picks), picks.below(2) == 1, memory.trained_step()
        with self._acking(ack):
            self._call("begin_step", plan, ack=ack, fence=fence, op=op)
        self.twins.counts["met: an ack with the next plan"] += memory.trained_step() > trained

    def leave(self, picks: Picks) -> None:
        step = self.twins.memory.trained_step() + picks.below(3)
        self._call("leave_step", step, fence=self._fence("consumer", picks))

    def ack(self, picks: Picks) -> None:
        ack = self._ack(picks)
        with self._acking(ack):
            self._call("ack_step", ack, fence=self._fence("consumer", picks), op=True)

    def _ack(self, picks: Picks) -> StepAck:
        """Of the next step, as a rule as its plan has it."""
        memory = self.twins.memory
        step = memory.trained_step() + (1 if not picks.rarely() else picks.below(3))
        plan = memory.get_plan(step)
        rev = (plan.rev if plan else 0) + (1 if picks.rarely() else 0)
        finished = list(plan.sample_ids) if plan else []
        if picks.below(4) == 3:
            finished = finished[1:]
        return StepAck(step, rev, tuple(finished))

    @contextmanager
    def _acking(self, ack: StepAck | None) -> Iterator[None]:
        """Remembers what the ack finished, if it is taken in the block."""
        trained = self.twins.memory.trained_step()
        yield
        if ack is not None and self.twins.memory.trained_step() == trained + 1:
            self._finished[ack.step] = list(ack.finished)

    def train_ack(self, picks: Picks) -> None:
        """The simple way, without plans; only of what is not folded: nobody acks what he cannot read."""
        self._call(
            "record_train_ack",
            picks.some(self._state("present", "lost", "released") or IDS[-2:]),
            global_step=picks.one([None, 1, 2, 3, self.twins.memory.trained_step()]),
            optimizer_durable=picks.below(4) == 3,
            fence=self._fence("consumer", picks),
        )

    def checkpoint(self, picks: Picks) -> None:
        head, memory = self._head(), self.twins.memory
        first = head.step + 1 if head else 1
        step = max(first, memory.trained_step())
        if picks.rarely():
            step = 1 + picks.below(step + 1)
        plans = [memory.get_plan(s) for s in range(first, step + 1)]
        known = [plan for plan in plans if plan is not None]
        chain = chain_of(head.chain if head else "", known)
        chain = picks.one([chain] * 5 + ["", "wrong"])
        record = CheckpointRecord(
            step, f"step-{step}-{picks.below(2)}", "digest", memory.committed_count(), chain
        )
        self._call("record_checkpoint", record, fence=self._fence("consumer", picks))
        if record in memory.checkpoints() and record != head:
            before = next((a.lineage for a in reversed(self._archive) if a.record == head), ())
            lineage = (*before, *(self._trained(plan) for plan in known))
            self._archive.append(Archived(record, lineage))

    def _trained(self, plan: StepPlan) -> TrainedStep:
        memory, finished = self.twins.memory, self._finished.get(plan.step, [])
        records = [memory.sample_record(i) for i in plan.sample_ids]
        samples = [
            TrainedSample(r.seq, r.sample_id, r.task_id, r.sample_id in finished) for r in records if r
        ]
        return TrainedStep(plan.step, plan.rev, plan.last_seq, tuple(samples))

    def adopt_again(self, picks: Picks) -> None:
        """A checkpoint that was recorded once, of a ledger that may have forgotten it."""
        if self._archive:
            archived = picks.one(self._archive)
            head = self._head()
            lineage = [t for t in archived.lineage if t.step > (head.step if head else 0)]
            self._adopt(archived.record, lineage, picks)

    def adopt_new(self, picks: Picks) -> None:
        """A lineage that nobody recorded, right or not."""
        head, memory = self._head(), self.twins.memory
        step, lineage, seq = (head.step if head else 0), [], memory.committed_count()
        unknown = [n for n in range(NUMBERS) if not memory.is_committed(IDS[n])]
        for _ in range(1 + picks.below(2)):
            step += 1
            plan = memory.get_plan(step)
            if plan is not None and picks.below(3):
                lineage.append(self._trained(plan))
                continue
            samples = [
                TrainedSample(r.seq, r.sample_id, r.task_id, picks.below(4) != 3)
                for r in map(memory.sample_record, picks.some(self._state("present", "lost", "quarantined")))
                if r is not None
            ]
            for number in unknown[: picks.below(3)]:
                seq += 1 if picks.below(5) != 4 else 2
                samples.append(TrainedSample(seq, IDS[number], TASKS[number], picks.below(4) != 3))
                unknown = unknown[1:]
            rev = (plan.rev if plan else 0) + picks.below(2)
            lineage.append(TrainedStep(step, rev, seq, tuple(samples)))
        before = head.chain if head else ""
        chain = "wrong" if picks.rarely() else chain_of(before, [t.plan for t in lineage])
        record = CheckpointRecord(step, f"step-{step}-adopted", "digest", seq, chain)
        self._adopt(record, lineage, picks)

    def _adopt(self, record: CheckpointRecord, lineage: list[TrainedStep], picks: Picks) -> None:
        before = self.twins.memory.committed_count()
        self._call("adopt_checkpoint", record, lineage, fence=self._fence("consumer", picks))
        entered = self.twins.memory.committed_count() - before
        self.twins.counts["met: a forgotten sample rolled forward"] += entered > 0
        if self._head() == record and not any(a.record == record for a in self._archive):
            self._archive.append(Archived(record, tuple(lineage)))

    def forget(self, picks: Picks) -> None:
        steps = [c.step for c in self.twins.memory.checkpoints()] or [1]
        self._call("forget_checkpoint", picks.one(steps), fence=self._fence("consumer", picks))

    def fall_back(self, picks: Picks) -> None:
        steps = [c.step for c in self.twins.memory.checkpoints()]
        step = picks.one([*steps, *steps, 0])
        lost = self._call("fall_back", step, fence=self._fence("consumer", picks))
        self.twins.counts["met: freed samples lost by falling back"] += bool(lost)

    def quarantine(self, picks: Picks) -> None:
        self._call(
            "quarantine",
            picks.some(IDS if picks.rarely() else self._state("present", "lost") or IDS, 2),
            step=picks.one([None, self.twins.memory.trained_step() + 1, 1]),
            reason=f"poison {picks.below(3)}",
            fence=self._fence("consumer", picks),
        )

    def release(self, picks: Picks) -> None:
        ids = list(
            self._call("begin_release", 1 + picks.below(6), fence=self._fence("consumer", picks)) or []
        )
        if picks.rarely():
            ids = picks.some(IDS)
        self._call("record_released", ids, fence=self._fence("consumer", picks))

    def compact(self, picks: Picks) -> None:
        self._call("compact", fence=self._fence("consumer", picks))
        folded = "SELECT count(*) FROM folded WHERE kind = 'samples'"
        forgotten = "SELECT count(*) FROM folded WHERE content IS NULL"
        self.twins.counts["met: folded samples"] += self.twins.sqlite._value(folded) > 0
        self.twins.counts["met: folded prompt ids"] += self.twins.sqlite._value(forgotten) > 0

    # -- in good order, so that samples come to the end of their lives --------------------------

    def capture(self, picks: Picks) -> None:
        """Lease, reserve, commit."""
        fence = self._fences["producer"][-1] if self._fences["producer"] else None
        leases = self._call("lease_tasks", "w0", 3, fence=fence, op=True) or []
        self.twins.leased(leases)
        numbers = [TASKS.index(lease.task_id) for lease in leases]
        sizes = {IDS[n]: 100 + n for n in numbers}
        generations = self._call("reserve", sizes, fence=fence, op=True)
        self.twins.reserved(generations)
        refs = [replace(sample_ref(n), generation=generations[IDS[n]]) for n in numbers]
        self._commit(refs[picks.below(2) :], fence=fence, op=True)

    def train(self, picks: Picks) -> None:
        """Begin the next step and ack it."""
        fence = self._fences["consumer"][-1] if self._fences["consumer"] else None
        plan = self._plan(self.twins.memory.trained_step() + 1, 0, picks)
        begun = self._call("begin_step", plan, fence=fence, op=True)
        if begun is not None:
            ack = StepAck(plan.step, begun.plan.rev, begun.plan.sample_ids)
            self._call("ack_step", ack, fence=fence, op=True)
            self._finished[plan.step] = list(ack.finished)

    def cover(self, picks: Picks) -> None:
        """Checkpoint, free, forget the older checkpoints, fold."""
        fence = self._fences["consumer"][-1] if self._fences["consumer"] else None
        self.checkpoint(Picks([]))
        freed = self._call("begin_release", 100, fence=fence) or []
        self._call("record_released", list(freed), fence=fence)
        for old in self.twins.memory.checkpoints()[: -1 - picks.below(3)]:
            self._call("forget_checkpoint", old.step, fence=fence)
        if picks.below(3):
            self.compact(Picks([]))

    # -- anybody -----------------------------------------------------------------------------

    def set_facts(self, picks: Picks) -> None:
        self._call("set_facts", {f"fact-{picks.below(3)}": [picks.below(5), None, "x"]})

    def settle_facts(self, picks: Picks) -> None:
        facts: dict[str, Any] = {f"fact-{picks.below(5)}": picks.below(5), "fact-x": (1, 2)}
        self._call("settle_facts", facts, fence=self._fence(picks.one(["producer", "consumer"]), picks))

    def repeat(self, picks: Picks) -> None:
        """A call whose result got lost, with the same op id: the same answer, and nothing happens."""
        if self._past:
            name, args, kwargs, value = picks.one(self._past)
            before = self.twins.memory.lsn()
            again = self._call(name, *args, **kwargs)
            self.twins.counts["met: a call repeated"] += 1
            if again != value or self.twins.memory.lsn() != before:
                raise DisagreementError(f"{name} repeated: {value} before, {again} now")

    def reopen(self, picks: Picks) -> None:
        self.twins.reopen()

    def save(self, picks: Picks) -> None:
        self.twins.save()

    def restore(self, picks: Picks) -> None:
        """The ledger goes back, its clients start anew; the checkpoints' folders stay."""
        if picks.below(2) and self.twins.restore():
            self.twins.counts["met: a ledger restored from a backup"] += 1
            self._fences = {"producer": [], "consumer": []}
            self._past = []


# How often a long run takes each, so that samples get through all of their life.
WEIGHTS: dict[str, int] = {
    "capture": 8, "train": 12, "cover": 7,
    "add_tasks": 3, "lease": 3, "reserve": 2, "revoke": 1, "skip": 1, "commit": 4,
    "commit_again": 2, "fail": 1,
    "give_back": 1, "report_lost": 2, "acquire": 2, "begin": 5, "leave": 1, "ack": 5, "train_ack": 1,
    "checkpoint": 3, "adopt_again": 2, "adopt_new": 2, "forget": 1, "fall_back": 2, "quarantine": 1,
    "release": 2, "compact": 2, "set_facts": 1, "settle_facts": 1, "repeat": 2,
    "reopen": 1, "save": 1, "restore": 1,
}  # fmt: skip


def random_script(rng: random.Random, length: int) -> list[tuple[str, bytes]]:
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    return [(name, rng.randbytes(PICKS)) for name in rng.choices(names, weights, k=length)]


def play(folder: Path, script: Sequence[tuple[str, bytes]], *, block: int, fold_from: int) -> Counter[str]:
    """Make these moves on a new pair of stores; how often each call was made, and what was met."""
    with small_blocks(block):
        twins = LedgerTwins(folder / "ledger.db", fold_from=fold_from)
        try:
            moves = LedgerMoves(twins)
            for name, picks in script:
                getattr(moves, name)(Picks(picks))
        finally:
            twins.close()
    return twins.counts


def play_at_random(folder: Path, seed: int, length: int) -> Counter[str]:
    """One seeded run of `length` moves."""
    rng = random.Random(seed)
    block, fold_from = rng.choice([2, 3, 4096]), rng.choice([1, 1, 2])
    return play(folder, random_script(rng, length), block=block, fold_from=fold_from)
