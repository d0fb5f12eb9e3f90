"""Kills whole light runs on a schedule, at every named point or in seeded mixtures, and checks the result.

    python -m paceline.testing.kill_schedules --seed 17 [--repeat 50]    one random schedule
    python -m paceline.testing.kill_schedules --name "..."               one systematic schedule
    python -m paceline.testing.kill_schedules --systematic --random 500  many; counts as JSON

A seed or a name fixes a schedule, but not how two real processes interleave, so a failure may need several
repetitions to recur.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from paceline import crashpoints
from paceline.errors import PacelineError
from paceline.roles.trainers import role_of_rank
from paceline.testing import killed_run
from paceline.testing.check_of_killed_runs import check
from paceline.testing.killed_run import Fault, KilledRun, Violation, producers_of, qualified
from paceline.testing.light_adapters import tokens_per_step
from paceline.testing.light_run import LightRun, Outcome, RunShape, expected_steps, uninterrupted
from paceline.testing.valkey_server import ValkeyServer

DEATHS_MAX = 4  # of one role in a schedule: five kills at one place may make a sample the culprit
PLAIN = RunShape(prompts=11, group=3, batch=3, passes=2, interval=2, threads=True)
FAILING = replace(PLAIN, bad_prompt=4, bad_sample=8)
FULL = RunShape(prompts=14, group=2, batch=2, passes=2, interval=1, tight=True, threads=True)
MODULE = "paceline.testing.kill_schedules"


@dataclass(frozen=True)
class Schedule:
    name: str  # what to pass to --seed or --name
    shape: RunShape
    faults: tuple[Fault, ...]

    @property
    def command(self) -> str:
        how = f"--seed {self.name}" if self.name.isdecimal() else f'--name "{self.name}"'
        several = f" --producers {self.shape.producers}" if self.shape.producers > 1 else ""
        several += f" --ranks {self.shape.ranks}" if self.shape.ranks > 1 else ""
        return f"python -m {MODULE} {how} --repeat 50{several}"


# -- which points there are ----------------------------------------------------------------


@cache
def points_of(shape: RunShape) -> dict[str, dict[str, int]]:
    """For each role, every point of an undisturbed run and how often it is reached."""
    folder = new_folder()
    run, found = LightRun(folder, replace(shape, tight=False)), {}
    for role, work in (("producer", run.produce), ("consumer", run.consume)):
        reached: Counter[str] = Counter()
        crashpoints.watch(partial(_count, reached))
        work()
        crashpoints.watch(None)
        found[role] = dict(reached)
    shutil.rmtree(folder)
    return found


def _count(reached: Counter[str], name: str) -> None:
    reached[qualified(name)] += 1


# What an undisturbed run never reaches, with the shape and the faults that lead there.
DETOURS: list[tuple[str, str, RunShape, tuple[Fault, ...]]] = [
    (
        "consumer",
        "ledger.set_facts(given_up).before ledger.set_facts(given_up).after"
        " ledger.fall_back.before ledger.fall_back.after @fall_back",
        PLAIN,
        (Fault("consumer", "damage_head", "ledger.set_facts(checkpoint_wanted).after", 3),),
    ),
    (
        "consumer",
        "checkpoints.claim.before checkpoint.after_claim checkpoints.claim.after"
        " ledger.head.before ledger.head.after @head",
        PLAIN,
        (Fault("consumer", "kill", "ledger.head.before", 2),),
    ),
    (
        "consumer",
        "features.get.failed ledger.report_lost.before ledger.report_lost.after @report_lost",
        PLAIN,
        tuple(Fault("consumer", "lose", "ledger.plan.before", 2, salt=salt) for salt in (0, 1)),
    ),
    (
        "producer",
        "features.free.between features.free.after"
        " ledger.report_lost.before ledger.report_lost.after @report_lost",
        PLAIN,
        (Fault("producer", "reboot", "ledger.commit.before", 3),),
    ),
    ("consumer", "features.get.failed", PLAIN, (Fault("consumer", "reboot", "features.get.after", 2),)),
    (
        "producer",
        "ledger.report_lost.after features.free.before features.free.between",
        FULL,
        (Fault("consumer", "damage_head", "features.free.after"),),
    ),
    (
        "producer",
        "ledger.set_facts(isolation).before ledger.set_facts(isolation).after @set_facts(isolation)"
        " engine.capture.before engine.capture.after",
        PLAIN,
        tuple(Fault("producer", "kill", "engine.capture.after") for _ in range(3)),
    ),
    (
        "consumer",
        "ledger.set_facts(isolation).before ledger.set_facts(isolation).after @set_facts(isolation)"
        " learner.attempt.before learner.attempt.after",
        PLAIN,
        tuple(Fault("consumer", "kill", "learner.step.after") for _ in range(3)),
    ),
]
OF_ANOTHER_RANK = [
    f"{call}.{side}"
    for call in ("learner.load", "learner.step", "learner.files", "learner.fingerprint", "features.get")
    for side in ("before", "after")
]
IN_TRANSACTION = ("ledger.after_begin", "ledger.before_commit", "ledger.after_commit")


def detours() -> Iterator[tuple[str, str, RunShape, tuple[Fault, ...]]]:
    for role, names, shape, prelude in DETOURS:
        for name in names.split():
            for point in [f"{part}{name}" for part in IN_TRANSACTION] if name[0] == "@" else [name]:
                yield role, point, shape, prelude


def places() -> set[tuple[str, str]]:
    """Every role and point that a systematic schedule strikes."""
    found = {(role, point) for role, point, *_ in detours()}
    for shape in (PLAIN, FAILING):
        for role, points in points_of(shape).items():
            found |= {(role, point) for point in points}
    return found


def systematic(*, on_server: bool = False) -> list[Schedule]:
    """Every point of both roles, at its first, second and third reach, killed once and twice.

    `on_server`: there are no points in a file's transactions; instead the server is killed around every call.
    """
    schedules = _systematic()
    if not on_server:
        return schedules
    schedules = [schedule for schedule in schedules if "@" not in schedule.faults[-1].point]
    killed = [s for s in schedules if s.name.endswith("/once") and s.faults[-1].point.startswith("ledger.")]
    return schedules + [
        Schedule(
            f"{s.name.removesuffix('once')}server",
            s.shape,
            (*s.faults[:-1], replace(s.faults[-1], kind="server")),
        )
        for s in killed
    ]


def _systematic() -> list[Schedule]:
    schedules: list[Schedule] = []
    for label, shape in (("plain", PLAIN), ("failing", FAILING)):
        for role, points in points_of(shape).items():
            known = points_of(PLAIN)[role] if label == "failing" else {}
            for point, count in sorted(points.items()):
                if point not in known:
                    schedules += _at(f"{label}/{role}/{point}", shape, role, point, min(count, 3), ())
    for role, point, shape, prelude in detours():
        label = f"after {len(prelude)} {prelude[0].kind}/{role}/{point}"
        schedules += _at(label, shape, role, point, 1, prelude)
    return schedules


def part_of(systematically: Sequence[Schedule]) -> list[Schedule]:
    """Every place still, in two schedules: killed twice at its first reach, and stopped at its third.

    A place that is reached less often is stopped at its first reach, and one that stands a single kill is
    killed once.
    """
    names = {schedule.name for schedule in systematically}

    def is_in(name: str) -> bool:
        place, turn, how = name.rsplit("/", 2)
        if how == "stopped":
            return turn == ("3" if f"{place}/3/stopped" in names else "1")
        return turn == "1" and (how == "twice" or f"{place}/1/twice" not in names)

    return [schedule for schedule in systematically if is_in(schedule.name)]


def _at(
    label: str, shape: RunShape, role: str, point: str, turns: int, before: tuple[Fault, ...]
) -> Iterator[Schedule]:
    for turn in range(1, turns + 1):
        kill = Fault(role, "kill", point, turn)
        stop = Fault(role, "stop", point, turn, wake_after=6)
        yield Schedule(f"{label}/{turn}/once", shape, (*before, kill))
        if len(before) < DEATHS_MAX - 1 and deaths_max(shape, role) > 1:
            yield Schedule(f"{label}/{turn}/twice", shape, (*before, kill, replace(kill, turn=1)))
        yield Schedule(f"{label}/{turn}/stopped", shape, (*before, stop))


def random_schedule(seed: int) -> Schedule:
    rng = random.Random(seed)
    shape = RunShape(
        prompts=rng.randint(6, 20),
        group=rng.randint(2, 4),
        batch=rng.randint(2, 4),
        passes=rng.randint(1, 2),
        interval=rng.randint(1, 4),
        tight=rng.random() < 0.5,
        kept=rng.randint(2, 3),
        bad_prompt=rng.randint(0, 5) if rng.random() < 0.15 else -1,
        bad_sample=rng.randint(0, 5) if rng.random() < 0.15 else -1,
        threads=rng.random() < 0.7,
        tokens=tokens_per_step(seed),
    )
    faults: list[Fault] = []
    deaths: Counter[str] = Counter()
    for _ in range(rng.randint(1, 5)):
        fault = _random_fault(rng)
        victims = ["producer", "consumer"] if fault.kind in ("kill_both", "reboot") else [fault.victim]
        if fault.kind != "lose":
            if any(deaths[role] == deaths_max(shape, role) for role in victims):
                continue
            deaths.update(victims)
        faults.append(fault)
    return Schedule(str(seed), shape, tuple(faults))


def of_several(schedule: Schedule, producers: int) -> Schedule:
    """The same with so many producers, of whom each fault strikes one."""
    if producers == 1:
        return schedule
    shape = replace(schedule.shape, producers=producers)
    names = producers_of(shape)
    faults = [
        fault if fault.victim == "consumer" else replace(fault, victim=names[number % producers])
        for number, fault in enumerate(schedule.faults)
    ]
    return replace(schedule, shape=shape, faults=tuple(faults))


def of_ranks(schedule: Schedule, ranks: int) -> Schedule:
    """The same with so many ranks; of the faults of the consumer, every second one strikes another rank."""
    if ranks == 1:
        return schedule
    rng, faults = random.Random(schedule.name), []
    for fault in schedule.faults:
        if fault.victim == "consumer" and fault.kind != "damage_head" and rng.random() < 0.5:
            victim, point = role_of_rank(rng.randrange(1, ranks)), rng.choice(OF_ANOTHER_RANK)
            fault = replace(fault, victim=victim, point=point, turn=rng.randint(1, 4))
        faults.append(fault)
    return replace(schedule, shape=replace(schedule.shape, ranks=ranks), faults=tuple(faults))


def deaths_max(shape: RunShape, role: str) -> int:
    """A death during a trial counts against who was tried; where trials are held anyway, one is enough."""
    return 1 if role == "consumer" and shape.bad_sample >= 0 else DEATHS_MAX


KINDS = {"kill": 9, "stop": 5, "kill_both": 2, "reboot": 1, "damage_head": 2, "lose": 3}


def _random_fault(rng: random.Random) -> Fault:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    victim = "consumer" if kind == "damage_head" else rng.choice(["producer", "consumer"])
    points = points_of(FAILING)[victim]
    if rng.random() < 0.25:
        point, turn = rng.choice([point for role, point, *_ in detours() if role == victim]), 1
    else:
        point = rng.choice(sorted(points))
        turn = rng.randint(1, 2 if rng.random() < 0.4 else points[point])
    return Fault(victim, kind, point, turn, wake_after=rng.randint(0, 14), salt=rng.randrange(1 << 30))


# -- running them --------------------------------------------------------------------------


def new_folder() -> Path:
    """In memory where the machine has such a filesystem: what a kill leaves does not depend on the disk."""
    memory = Path("/dev/shm")  # noqa: S108 (a new private folder in it)
    return Path(tempfile.mkdtemp(prefix="paceline-kills-", dir=memory if memory.is_dir() else None))


@cache
def reference(shape: RunShape) -> Outcome:
    folder = new_folder()
    outcome = uninterrupted(shape, folder)
    shutil.rmtree(folder)
    assert outcome.trained == [batch for batch in expected_steps(shape) if batch]
    return outcome


def execute(schedule: Schedule, server: ValkeyServer | None = None) -> Counter[str]:
    """Run it and check what must hold after. Raises Violation, with the command that repeats it.

    `server`: on which the ledger is to lie; a process that this one started.
    """
    folder = new_folder()
    # The weights do not depend on how much room there is, nor on how often they are made durable.
    wanted = reference(
        replace(schedule.shape, tight=False, interval=4, kept=2, threads=False, producers=1, ranks=1)
    )
    run = LightRun(folder, schedule.shape, server.url if server else "")
    killed = KilledRun(run, schedule.faults, restart=server.restart if server else nothing)
    try:
        killed.drive()
        check(killed, wanted)
    except (Violation, PacelineError) as violation:
        story = "\n".join([*map(str, schedule.faults), *killed.history[-60:]])
        raise Violation(
            f"{violation}\n{schedule.shape}\n{story}\nthe run is in {folder}\n"
            f"repeat: {schedule.command}{' --server' if server else ''}"
        ) from violation
    shutil.rmtree(folder)
    counts = +killed.counts
    counts["schedules"] = 1
    counts["faults that struck"] = len(schedule.faults) - len(killed.pending)
    return counts


def nothing() -> None:
    """There is no server."""


def execute_all(
    schedules: Sequence[Schedule], jobs: int, *, on_server: bool = False, enough: int = 3
) -> Counter[str]:
    """`jobs` schedules at a time, in forked workers. Raises Violation with the first few that broke.

    `on_server`: each worker has a server of its own for its ledgers. `enough`: violations, after which a
    worker ends.
    """
    points_of(PLAIN), points_of(FAILING)
    gc.collect()
    gc.freeze()  # forks copy less
    readers = []
    for job in range(jobs):
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(read)
            _worker(schedules[job::jobs], write, on_server=on_server, enough=enough)
        os.close(write)
        readers.append(read)
    total: Counter[str] = Counter()
    violations: list[str] = []
    for read in readers:
        with os.fdopen(read, "rb") as pipe:
            answer = json.loads(pipe.read() or b'{"counts": {}, "violations": ["a worker died"]}')
        total.update(answer["counts"])
        violations += answer["violations"]
        os.wait()
    if violations:
        first_lines = [violation.partition("\n")[0] for violation in violations[3:]]
        raise Violation(f"{len(violations)} violations:\n" + "\n\n".join([*violations[:3], *first_lines]))
    return total


@contextmanager
def own_server() -> Iterator[ValkeyServer]:
    folder = new_folder()
    with ValkeyServer(folder) as server:
        yield server
    shutil.rmtree(folder)


def _worker(schedules: Sequence[Schedule], write: int, *, on_server: bool, enough: int) -> None:
    """Never returns."""
    counts: Counter[str] = Counter()
    violations: list[str] = []
    try:
        with own_server() if on_server else nullcontext() as server:
            for schedule in schedules:
                try:
                    counts.update(execute(schedule, server))
                except Violation as violation:
                    violations.append(str(violation))
                    if len(violations) == enough:
                        break
    except BaseException:  # noqa: BLE001 (told to the parent; a fork must not return into its stack)
        violations.append(traceback.format_exc())
    answer = json.dumps({"counts": counts, "violations": violations}).encode()
    while answer:
        answer = answer[os.write(write, answer) :]
    os._exit(0)


def main() -> int:
    arguments = argparse.ArgumentParser(prog=MODULE)
    arguments.add_argument("--seed", type=int)
    arguments.add_argument("--name")
    arguments.add_argument("--repeat", type=int, default=1)
    arguments.add_argument("--systematic", nargs="?", const="whole", choices=["part", "whole"])
    arguments.add_argument("--random", type=int, default=0)
    arguments.add_argument("--first-seed", type=int, default=0)
    arguments.add_argument("--jobs", type=int, default=1)
    arguments.add_argument(
        "--deadline", type=float, default=killed_run.DEADLINE_S, help="seconds a run may take"
    )
    arguments.add_argument("--producers", type=int, default=1)
    arguments.add_argument("--ranks", type=int, default=1)
    arguments.add_argument("--server", action="store_true", help="the ledger lies on a server of its own")
    given = arguments.parse_args()
    killed_run.DEADLINE_S = given.deadline
    systematically = systematic(on_server=given.server) if given.systematic or given.name else []
    chosen = {"part": part_of(systematically), "whole": systematically}
    schedules = list(chosen[given.systematic]) if given.systematic else []
    schedules += [random_schedule(given.first_seed + n) for n in range(given.random)]
    if given.seed is not None:
        schedules += [random_schedule(given.seed)] * given.repeat
    if given.name:
        schedules += [s for s in systematically if s.name == given.name] * given.repeat
    schedules = [of_ranks(of_several(schedule, given.producers), given.ranks) for schedule in schedules]
    try:
        enough = 1 if given.repeat > 1 else 3  # what may take several plays is found with the first of them
        counts = execute_all(schedules, given.jobs, on_server=given.server, enough=enough)
    except Violation as violation:
        sys.stderr.write(f"{violation}\n")
        return 1
    assert "torch" not in sys.modules, "light mode imports no torch"
    sys.stdout.write(json.dumps(counts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
