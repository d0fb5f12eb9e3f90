"""A deterministic simulation of whole runs: the product's own producer, loader, trainer and sessions.

Producers and consumers are greenlets over simulated parts. A seeded scheduler decides which actor makes
the next change, which is killed or suspended while a successor takes over (and resumed later: a zombie),
which answers, features and checkpoints get lost, and when the power fails. A seed draws its own run and
its own mix of faults. The scheduler also owns the clock: it moves with every turn, and by a time-out when
no actor is ready. Whatever happens, the run must end in the weights of the undisturbed run, and every
rule in simulated_parts.py must hold all the time. Half of the seeds have three producers; a tenth runs on
the SQLite ledger and its real files, the others on the specification.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]

from paceline.errors import (
    ConfigError,
    FencedError,
    PacelineError,
    StoreError,
    TrainingError,
    UnknownResultError,
)
from paceline.ledger.facts import COMPLETED_STEP
from paceline.ledger.records import CONSUMER, CheckpointRecord, State, producer_role
from paceline.loader.loader import WAIT_S
from paceline.testing.light_adapters import HashLearner, tokens_per_step
from paceline.testing.simulated_parts import (
    SimulatedDisk,
    SimulatedFeatures,
    SimulatedFolder,
    SimulatedFolders,
    SimulatedLedger,
    SlowDisk,
    ViolationError,
)
from paceline.testing.simulated_places import InFiles, InMemory, Place
from paceline.testing.simulated_run import RUN_ID, Shape, simulated_consumer, simulated_producer

SWITCHES_MAX = 6_000  # twenty times what the longest run needs
IDLE_MAX = 400
REAL_EVERY = 10  # seeds: one of them runs on the SQLite ledger, its features through the codec
MEMORY = Path("/dev/shm")  # noqa: S108 (private folders in it)
TURN_S = 0.1
SWITCHES_A_PRODUCER = 4_000
KINDS = ("kill", "kill", "kill_both", "zombie", "zombie", "lose", "corrupt", "damage", "power", "forget")
COUNTED = (
    *("fall_back", "rolled_forward", "made_room", "waiting_for_recapture", "quarantined"),
    "taken_over",
)


class Killed(BaseException):
    """The process is gone; nothing it still does counts."""


@dataclass(frozen=True)
class Culprits:
    """Samples (by number) that the engine or the trainer fails on, or dies of."""

    engine_fails: tuple[int, ...] = ()
    engine_dies: tuple[int, ...] = ()
    trainer_fails: tuple[int, ...] = ()
    trainer_dies: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass
class Fault:
    kind: str
    role: str  # of which the victim is, or one of several workers, by turns
    after: int  # scheduling points of the run


@dataclass(eq=False)
class Actor:
    """One process."""

    role: str
    run: greenlet
    dead: bool = False
    suspended: bool = False
    replaced: bool = False
    waits_for: int | None = None  # the ledger's number it has seen
    at: str = "start"
    learner: HashLearner | None = None


@dataclass
class World:
    """Everything of one simulated run. It is also every actor's `Way`."""

    shape: Shape
    culprits: Culprits
    rng: random.Random
    faults: list[Fault]
    lossy: float = 0.0
    place: Place = field(default_factory=InMemory)
    expected: dict[int, bytes] | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.disk = SimulatedDisk(self.place, may_lose_power=any(f.kind == "power" for f in self.faults))
        self.features = self.place.features(self.shape.budget_bytes)
        self.folders = SimulatedFolders()
        self.actors: list[Actor] = []
        self.epochs: dict[str, int] = {}
        self.switches = self.idle = self.reboots = 0
        self.now = 0.0
        self.scheduler = getcurrent()
        self.running: Actor | None = None
        self.trajectory: dict[int, bytes] = {}
        self.failure: PacelineError | None = None

    # -- what actors see -------------------------------------------------------------------

    def point(self, name: str) -> None:
        actor = self.running
        assert actor is not None
        if not actor.dead:
            actor.at = name
            self.scheduler.switch()
        if actor.dead:
            raise Killed

    def wait(self, seen_lsn: int) -> None:
        actor = self.running
        assert actor is not None
        actor.waits_for = seen_lsn
        self.point("wait")
        actor.waits_for = None

    def loses_result(self) -> bool:
        lost = self.rng.random() < self.lossy
        self.counts["answers lost"] += lost
        return lost

    def count(self, name: str) -> None:
        self.counts[name] += 1

    def took(self, role: str) -> None:
        """Who takes a role last has it, also if that process was started earlier and held up."""
        self.epochs[role] = self.epochs.get(role, 0) + 1
        for actor in self.actors:
            if actor.role == role:
                actor.replaced = actor is not self.running

    def _report(self, event: str, **fields: Any) -> None:
        if event in COUNTED:
            self.counts[event] += 1
        if event == "started" and fields["orphans"]:
            self.counts["orphan features swept"] += 1

    def may_be_head(self, record: CheckpointRecord) -> None:
        """Every head's weights lie on the trajectory of the run to which nothing happened."""
        if record.name not in self.folders.held:
            raise ViolationError(f"the head at step {record.step} has no folder")
        weights = bytes(self.folders.held[record.name][1].files["weights.bin"])
        if self.expected is not None and self.expected.get(record.step) != weights:
            raise ViolationError(f"the head at step {record.step} has other weights than that step has")
        self.trajectory[record.step] = weights
        self.folders.recorded.add(record.name)

    # -- actors ----------------------------------------------------------------------------

    def _spawn(self, role: str) -> None:
        for other in self.actors:
            other.replaced = other.replaced or other.role == role
        actor = Actor(role, greenlet(lambda: None))
        actor.run = greenlet(lambda: self._live(actor, self._consume if role == CONSUMER else self._produce))
        self.actors.append(actor)
        self.counts[f"{role.partition(':')[0]}s"] += 1

    def _live(self, actor: Actor, work: Callable[[Actor], None]) -> None:
        try:
            work(actor)
        except Killed:
            pass
        except FencedError:
            if not actor.replaced:
                raise ViolationError(
                    f"a {actor.role} that nobody replaced was fenced at {actor.at}"
                ) from None
            self.counts[f"zombie rejected at {actor.at}"] += 1
        except UnknownResultError:
            self.counts["gave up after unknown results"] += 1  # and is started again
        except PacelineError as error:
            if type(error) is StoreError and self.now >= self.shape.patience_s:
                self.counts["gave up waiting for a capture"] += 1  # and is started again
            elif not actor.replaced:
                self.failure = error
        actor.dead = True

    def _parts(self, actor: Actor) -> tuple[Any, Any]:
        ledger = SimulatedLedger(self.disk, self, self.may_be_head)
        return ledger, SimulatedFeatures(self.features, self.disk, self)

    def _produce(self, actor: Actor) -> None:
        ledger, features = self._parts(actor)
        worker = actor.role.partition(":")[2]
        engine = self.shape.engine(
            self._refuses(actor, self.culprits.engine_fails, self.culprits.engine_dies, RuntimeError)
        )
        producer = simulated_producer(
            self.shape, worker, ledger, features, engine, self._report, lambda: self.now
        )
        producer.run(should_stop=lambda: COMPLETED_STEP in ledger.facts())

    def _consume(self, actor: Actor) -> None:
        ledger, features = self._parts(actor)
        refuses = self._refuses(actor, self.culprits.trainer_fails, self.culprits.trainer_dies, TrainingError)
        actor.learner = HashLearner(refuses)
        folder: Any = SimulatedFolder(self.folders, self.disk, self)
        disk = SlowDisk(lambda: self.rng.randrange(3))
        trainer, loader = simulated_consumer(
            self.shape, ledger, features, folder, actor.learner, disk, self._report, lambda: self.now
        )
        step = trainer.fit(loader)
        if loader.exhausted and ledger.snapshot().usage.waiting_samples == 0:
            trainer.session.set_facts({COMPLETED_STEP: step})

    def _refuses(
        self, actor: Actor, fails: Sequence[int], dies: Sequence[int], error: type[Exception]
    ) -> Callable[[Sequence[str]], None] | None:
        failing, killing = ({self.shape.sample_ids[n] for n in numbers} for numbers in (fails, dies))

        def refuses(ids: Sequence[str]) -> None:
            if killing & set(ids):
                actor.dead = True
                self.counts["deaths of culprits"] += 1
                raise Killed
            if failing & set(ids):
                raise error(f"{sorted(failing & set(ids))[0]} is a culprit")

        return refuses if failing or killing else None

    # -- the scheduler ---------------------------------------------------------------------

    def run(self) -> None:
        while not self._is_complete():
            self.switches += 1
            self.now += TURN_S
            if self.switches > SWITCHES_MAX + SWITCHES_A_PRODUCER * (self.shape.producers - 1):
                raise ViolationError("the run does not come to an end")
            self._inject()
            self._start_what_is_missing()
            self._continue_zombies()
            ready = [a for a in self._living() if not a.suspended and self._is_awake(a)]
            if ready:
                self.idle = 0
                self._resume(self.rng.choice(ready))
            else:
                self._nobody_is_ready()
            if self.failure is not None:
                raise self.failure
        for actor in self._living():
            self._kill(actor)

    def _living(self) -> list[Actor]:
        return [actor for actor in self.actors if not actor.dead]

    def _is_awake(self, actor: Actor) -> bool:
        return actor.waits_for is None or self.disk.ledger.lsn() != actor.waits_for

    def _resume(self, actor: Actor) -> None:
        self.running = actor
        actor.run.switch()
        self.running = None

    def _continue_zombies(self) -> None:
        for actor in self._living():
            if actor.suspended and actor.replaced and self.rng.random() < 0.05:
                actor.suspended = False
                self.counts["zombies continued"] += 1

    def _nobody_is_ready(self) -> None:
        stopped = [actor for actor in self._living() if actor.suspended]
        if stopped:
            stopped[0].suspended = False
            return
        self.idle += 1
        if self.idle > IDLE_MAX:
            waiting = [(actor.role, actor.at) for actor in self._living()]
            raise ViolationError(f"producer and consumer wait for each other: {waiting}")
        self.now += WAIT_S
        for actor in self._living():  # every time-out strikes
            self._resume(actor)

    def _is_complete(self) -> bool:
        return COMPLETED_STEP in self.disk.ledger.facts()

    def _start_what_is_missing(self) -> None:
        for role in (*self._producers, CONSUMER):
            if any(a.role == role and not a.suspended and not a.replaced for a in self._living()):
                continue
            now = self.disk.ledger.snapshot()
            if role == CONSUMER or now.prompts.open or not now.closed:
                self._spawn(role)

    @property
    def _producers(self) -> list[str]:
        return [producer_role(str(number)) for number in range(self.shape.producers)]

    def _kill(self, actor: Actor) -> None:
        actor.dead = True
        self.counts[f"killed at {actor.at}"] += 1
        if actor.run:  # it has begun
            self._resume(actor)

    def _inject(self) -> None:
        while self.faults and self.faults[0].after <= self.switches:
            fault = self.faults.pop(0)
            self._FAULTS[fault.kind](self, fault)
            self.counts[f"fault {fault.kind}"] += 1

    # -- faults ----------------------------------------------------------------------------

    def _victims(self, fault: Fault) -> list[Actor]:
        """One worker, if there are several."""
        role = CONSUMER
        if fault.role != CONSUMER:
            role = self._producers[fault.after % len(self._producers)]
        return [a for a in self._living() if a.role == role and not a.suspended]

    def _kill_fault(self, victims: Sequence[Actor]) -> None:
        for actor in victims:
            self._kill(actor)

    def _kill_role(self, fault: Fault) -> None:
        self._kill_fault(self._victims(fault))

    def _kill_both(self, _: Fault) -> None:
        self._kill_fault(self._living())

    def _zombie(self, fault: Fault) -> None:
        for actor in self._victims(fault):
            actor.suspended = True

    def _lose(self, _: Fault) -> None:
        if held := sorted(self.features.generations()):
            self.features.lose(self.rng.choice(held))

    def _corrupt(self, _: Fault) -> None:
        if held := sorted(self.features.generations()):
            self.features.damage(self.rng.choice(held))

    def _damage(self, _: Fault) -> None:
        """The newest of several retained checkpoints; found when the next consumer starts."""
        heads = self.disk.ledger.snapshot().checkpoints
        whole = [head for head in heads if head.name not in self.folders.damaged]
        if len(whole) > 1:
            self.folders.damaged.add(whole[-1].name)
            self._kill_fault([a for a in self._living() if a.role == CONSUMER])

    def _forget(self, _: Fault) -> None:
        """A reboot: shared memory is gone, and with it every process."""
        self._kill_fault(self._living())
        self.reboots += 1
        self.features.wipe(f"light://{self.reboots}")

    def _power(self, fault: Fault) -> None:
        self._forget(fault)
        self.disk.lose_power(self.rng.random())
        self.epochs.update(self.disk.ledger.snapshot().epochs)

    _FAULTS = {
        "kill": _kill_role,
        "kill_both": _kill_both,
        "zombie": _zombie,
        "lose": _lose,
        "corrupt": _corrupt,
        "damage": _damage,
        "forget": _forget,
        "power": _power,
    }

    # -- the end ---------------------------------------------------------------------------

    def check_the_end(self) -> None:
        """Nothing is lost, nothing is left, and nothing was trained more often than configured."""
        ledger, ids = self.disk.ledger, self.shape.sample_ids
        aside, finished = self.aside(), self._finished()
        if set(finished) | aside != set(ids) or set(finished) & aside:
            missing, both = set(ids) - set(finished) - aside, set(finished) & aside
            raise ViolationError(f"not trained: {sorted(missing)}; trained and failed: {sorted(both)}")
        for role in self._producers:
            self._spawn(role)
            last = self.actors[-1]
            while not last.dead:
                last.waits_for = None
                self._resume(last)
        left, owned = set(self.features.generations()), ledger.ownership()
        if left or owned.present or owned.promised or owned.revoked:
            raise ViolationError(f"left behind: {sorted(left)}, {owned}")
        if any(visits != self.shape.passes for visits in finished.values()):
            raise ViolationError("a sample was visited more or less often than configured")

    def aside(self) -> set[str]:
        """Samples that were quarantined, and those of prompts that failed."""
        ledger = self.disk.ledger
        quarantined = {record.sample_id for record in ledger.find(state=State.QUARANTINED).values()}
        return quarantined | {f"{RUN_ID}:{ordinal}" for ordinal in ledger.failed()}

    def _finished(self) -> dict[str, int]:
        """Samples that the head's weights contain, and how often each was visited."""
        head = self.disk.ledger.snapshot().head
        steps = [t for t in self.disk.ledger.history() if head is not None and t.step <= head.step]
        visits = Counter(sample.sample_id for trained in steps for sample in trained.samples)
        ended = [sample.sample_id for trained in steps for sample in trained.samples if sample.finished]
        if len(set(ended)) < len(ended):
            raise ViolationError("a sample was trained for the last time twice")
        return {sample_id: visits[sample_id] for sample_id in ended}


@cache
def crash_free(shape: Shape, culprits: Culprits) -> tuple[dict[int, bytes], frozenset[str]] | None:
    """Weights by step, and what fails, of the run to which nothing but its culprits happens.

    None if the culprits halt it: then there is nothing to compare with.
    """
    world = World(shape, culprits, random.Random(0), [])
    try:
        world.run()
    except PacelineError:
        return None
    return world.trajectory, frozenset(world.aside())


def draw(seed: int, place: Place | None = None) -> World:
    """The run and the faults of a seed; `place`: of its ledger, in memory by default."""
    rng = random.Random(seed)
    shape = Shape(
        prompts=rng.choice((5, 8, 12)),
        group=rng.choice((2, 3, 4)),
        batch=rng.choice((1, 2, 3)),
        passes=rng.choice((1, 1, 2)),
        interval=rng.choice((1, 2, 3, 5)),
        spare=rng.choice((None, 0, 0, 1, 3)),
    )
    # Drawn by itself, so that a seed keeps everything else that it drew before there was a clock.
    patience_s = random.Random(f"patience {seed}").choice((Shape.patience_s, Shape.patience_s, 1.5, 0.5))
    timeout_s = random.Random(f"timeout {seed}").choice((Shape.timeout_s, 30.0, 3.0))
    shape = replace(shape, patience_s=patience_s, timeout_s=timeout_s, producers=3 if seed % 2 else 1)
    shape = replace(shape, tokens=tokens_per_step(seed))
    culprits = Culprits()
    if rng.random() < 0.2:
        kind = rng.choice(tuple(vars(culprits)))
        culprits = replace(culprits, **{kind: (rng.randrange(shape.prompts),)})
    kinds = rng.sample(KINDS, rng.randint(1, 4))
    faults = [
        Fault(rng.choice(kinds), rng.choice(("producer", CONSUMER)), round(rng.random() ** 2 * 400))
        for _ in range(rng.choice((0, 1, 2, 3, 4, 6, 8)) if not culprits else rng.choice((0, 1, 2)))
    ]
    lossy = rng.choice((0.0, 0.0, 0.02, 0.1))
    return World(shape, culprits, rng, sorted(faults, key=lambda f: f.after), lossy, place or InMemory())


def simulate(seed: int) -> Counter[str]:
    """One seed; what happened in it. Raises ViolationError."""
    if seed % REAL_EVERY:
        return simulate_world(seed, draw(seed))
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        return simulate_world(seed, draw(seed, InFiles(Path(folder))))


def simulate_world(seed: int, world: World) -> Counter[str]:
    known = crash_free(world.shape.weights_only, world.culprits)
    if known is None:
        return Counter({"halted by culprits": 1})
    world.expected, aside = known
    world.scheduler = getcurrent()
    try:
        world.run()
        world.check_the_end()
    except ViolationError as violation:
        raise ViolationError(f"seed {seed}: {violation}") from violation
    except (PacelineError, ConfigError) as error:
        raise ViolationError(f"seed {seed}: {type(error).__name__}: {error}") from error
    found = world.aside()
    world.disk.close()
    if found != aside:
        raise ViolationError(f"seed {seed}: failed {sorted(found)} instead of {sorted(aside)}")
    world.counts["runs"] += 1
    world.counts["runs on real files"] += isinstance(world.place, InFiles)
    world.counts["runs of three producers"] += world.shape.producers == 3
    return world.counts
