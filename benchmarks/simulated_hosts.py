"""A discrete-event simulation of a run on many hosts: who waits for what. Nothing is captured or trained.

Producers lease groups as far ahead as the budget lets them (the product's own `Watermarks`), capture, write
through their host's network into the shared storage, and commit. The trainer takes the next visits in order,
reads a step ahead, trains, acknowledges, and writes a checkpoint every so many steps or when a producer waits
for room; only then is room free again. The ledger serves one call at a time. A producer that waits asks it
again after every change, as the product's does, so many that wait are work for it, too.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

from paceline.capture.backpressure import Watermarks
from paceline.roles.at_scale import LedgerCost

Events = Generator[simpy.Event, Any, Any]
LEDGER_CALLS = 3  # of a group: lease, reserve, commit
WAIT_S = 1.0  # after which a producer that waits asks again without a change


@dataclass(frozen=True)
class Simulated:
    """Times in seconds, sizes in bytes, rates in bytes a second.

    `group_s`: of one producer; `uneven`: by which share a group may take longer or shorter. `step_s`: of all
    ranks together, gradients included. `ask_s`: what the ledger does for a producer that waits and looks
    again. `stall_s`, `write_s`: of a checkpoint, for which training waits, and until it is durable.
    """

    samples: int
    producers: int
    group_s: float
    step_s: float
    marks: Watermarks
    ledger: LedgerCost
    sample_bytes: float
    batch: int
    passes: int = 1
    interval: int = 50
    producers_of_a_host: int = 8
    host_rate: float = 12.5e9
    trainers_rate: float = 100e9
    storage_rate: float = 50e9
    uneven: float = 0.2
    ask_s: float = 60e-6
    stall_s: float = 0.0
    write_s: float = 1.0
    first_samples: int = 0
    seed: int = 0


@dataclass
class Outcome:
    """`rate`: samples a second, without the beginning and the end. Shares of the whole time: how long each
    side waited, and ledger and storage were busy."""

    rate: float = 0.0
    seconds: float = 0.0
    producers_waited: float = 0.0
    trainer_waited: float = 0.0
    ledger_busy: float = 0.0
    storage_busy: float = 0.0
    checkpoints: int = 0
    trained_at: list[tuple[float, int]] = field(default_factory=list, repr=False)


class Server:
    """Serves one at a time, and counts how long."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env, self._queue, self.busy = env, simpy.Resource(env, capacity=1), 0.0

    def serve(self, seconds: float) -> Events:
        with self._queue.request() as turn:
            yield turn
            self.busy += seconds
            yield self._env.timeout(seconds)


class Run:
    def __init__(self, shape: Simulated) -> None:
        self.shape, self.env = shape, simpy.Environment()
        env, hosts = self.env, -(-shape.producers // shape.producers_of_a_host)
        self.ledger, self.storage = Server(env), Server(env)
        self.networks, self.reading = [Server(env) for _ in range(hosts)], Server(env)
        self.random, self.outcome = random.Random(shape.seed), Outcome()
        self.groups = -(-shape.samples // shape.marks.group_samples)
        self.next_group = self.settled = self.waiting = self.used = 0
        self.committed: set[int] = set()
        self.resident = 0.0  # bytes, promised ones included
        self.resident_samples = 0
        self.wanted = False  # a checkpoint
        self.done = False
        self.changed = env.event()
        self.released = 0  # groups whose features are free
        self.waited = 0.0

    def go(self) -> Outcome:
        for number in range(self.shape.producers):
            self.env.process(self.produce(number))
        self.env.process(self.answer_those_who_wait())
        end = self.env.process(self.train())
        self.env.run(until=end)
        told, shape = self.outcome, self.shape
        told.seconds = self.env.now
        told.producers_waited = self.waited / shape.producers / self.env.now
        told.trainer_waited /= self.env.now
        told.ledger_busy = self.ledger.busy / self.env.now
        told.storage_busy = self.storage.busy / self.env.now
        return told

    def change(self) -> None:
        """Whoever waits looks again."""
        self.changed.succeed()
        self.changed = self.env.event()

    def call(self, seconds: float) -> Events:
        yield from self.ledger.serve(seconds)
        self.change()

    def answer_those_who_wait(self) -> Events:
        """Each of them asks once after every change; changes meanwhile are one."""
        while True:
            yield self.changed
            if self.waiting:
                yield from self.ledger.serve(self.waiting * self.shape.ask_s)

    # -- producers ---------------------------------------------------------------------------

    def has_room(self, paused: bool) -> bool:
        marks = self.shape.marks
        full = self.resident > (marks.resume_bytes if paused else marks.budget_bytes - marks.group_bytes)
        if marks.budget_samples is not None:
            most = marks.resume_samples if paused else marks.budget_samples - marks.group_samples
            full = full or self.resident_samples > most
        return not full

    def wait(self) -> Events:
        began, self.waiting = self.env.now, self.waiting + 1
        yield self.changed | self.env.timeout(WAIT_S)
        self.waiting -= 1
        self.waited += self.env.now - began

    def produce(self, number: int) -> Events:
        shape, marks = self.shape, self.shape.marks
        network, size = self.networks[number // shape.producers_of_a_host], marks.group_samples
        written = size * shape.sample_bytes
        call_s = shape.ledger.group_s / LEDGER_CALLS
        while True:
            paused = False
            while not self.has_room(paused):
                paused = self.wanted = True
                yield from self.wait()
            if self.next_group >= self.groups:
                return
            if self.next_group >= self.settled + marks.groups_ahead:
                yield from self.wait()
                continue
            group, self.next_group = self.next_group, self.next_group + 1
            self.resident += marks.group_bytes
            self.resident_samples += size
            yield from self.call(2 * call_s)
            spread = 1 + shape.uneven * self.random.uniform(-1, 1)
            yield self.env.timeout(shape.group_s * spread)
            yield from network.serve(written / shape.host_rate)
            yield from self.storage.serve(written / shape.storage_rate)
            yield from self.ledger.serve(call_s + size * shape.ledger.sample_s / 2)
            self.resident += written - marks.group_bytes
            self.committed.add(group)
            while self.settled in self.committed:
                self.committed.remove(self.settled)
                self.settled += 1
            self.change()

    # -- the trainer -------------------------------------------------------------------------

    def block_of(self, visits: int) -> int:
        """How many groups must be settled for so many visits: each stage visits all groups of its window."""
        size, passes = self.shape.marks.group_samples, self.shape.passes
        ramp = size * passes * (passes - 1) // 2  # of the first passes - 1 stages
        if visits > ramp:
            return min(self.groups, passes - 1 + -(-(visits - ramp) // (size * passes)))
        stage = 0
        while size * stage * (stage + 1) // 2 < visits:
            stage += 1
        return min(self.groups, stage)

    def settle(self, groups: int) -> Events:
        began = self.env.now
        while self.settled < groups:
            yield self.changed | self.env.timeout(WAIT_S)
        self.outcome.trainer_waited += self.env.now - began

    def read(self, visits: int) -> Events:
        """In parts of a group, so that the producers write between them."""
        shape, left = self.shape, visits
        while left > 0:
            part = min(left, shape.marks.group_samples)
            yield from self.reading.serve(part * shape.sample_bytes / shape.trainers_rate)
            yield from self.storage.serve(part * shape.sample_bytes / shape.storage_rate)
            left -= part

    def train(self) -> Events:
        shape, total = self.shape, self.shape.samples * self.shape.passes
        first = -(-shape.first_samples // shape.marks.group_samples)
        yield from self.settle(min(self.groups, first))
        visits = step = at_checkpoint = 0
        ahead: simpy.Event | None = None
        writing: simpy.Process | None = None
        while visits < total:
            batch = min(shape.batch, total - visits)
            yield from self.settle(self.block_of(visits + batch))
            began = self.env.now
            yield ahead or self.env.process(self.read(batch))
            self.outcome.trainer_waited += self.env.now - began
            visits, step = visits + batch, step + 1
            more = min(shape.batch, total - visits)
            there = more and self.settled >= self.block_of(visits + more)
            ahead = self.env.process(self.read(more)) if there else None
            yield self.env.timeout(shape.step_s * batch / shape.batch)
            yield from self.call(shape.ledger.step_s + batch * shape.ledger.sample_s / 2 / shape.passes)
            self.used = visits
            self.outcome.trained_at.append((self.env.now, batch))
            is_free = writing is None or not writing.is_alive
            due = step - at_checkpoint >= shape.interval
            if (due or self.wanted) and is_free and self.groups_done(visits) > self.released:
                at_checkpoint, self.wanted = step, False
                yield self.env.timeout(shape.stall_s)
                writing = self.env.process(self.checkpoint(self.groups_done(visits)))

    def groups_done(self, visits: int) -> int:
        """Whose last visit was made."""
        return max(0, self.block_of(visits + 1) - self.shape.passes)

    def checkpoint(self, groups: int) -> Events:
        shape = self.shape
        yield self.env.timeout(shape.write_s)
        freed, self.released = (groups - self.released) * shape.marks.group_samples, groups
        yield from self.ledger.serve(shape.ledger.step_s)
        self.resident -= freed * shape.sample_bytes
        self.resident_samples -= freed
        self.outcome.checkpoints += 1
        self.change()


def simulate(shape: Simulated) -> Outcome:
    """The run from its beginning to its last step; `rate` leaves the first tenth of the steps out."""
    told = Run(shape).go()
    steps = told.trained_at[len(told.trained_at) // 10 :]
    seconds = steps[-1][0] - steps[0][0]
    told.rate = sum(number for _, number in steps[1:]) / shape.passes / seconds
    return told
