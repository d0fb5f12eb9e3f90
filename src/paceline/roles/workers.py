"""The producers of a run by name: workers of its ledger, and roles on this host.

Worker "0" has the role `producer`, worker "2" the role `producer-2`, with lock, events and log of that name.
`paceline train` starts the workers below `machine.producers`; one that joins takes a free name above them.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any

from paceline.capture.neighbours import BEATS_PER_TIMEOUT
from paceline.config.run import RunConfig
from paceline.errors import ConfigError, FencedError, LedgerError, RunBusyError
from paceline.ledger.facts import COMPLETED_STEP, PRODUCERS_STARTED, producer_fact, producers_in
from paceline.ledger.ledger import Ledger
from paceline.ledger.locks import RoleLock, live_holder
from paceline.ledger.producer_session import WORKER
from paceline.ledger.records import Fence, producer_role
from paceline.ledger.session import repeated, write_facts

PRODUCER, CONSUMER = "producer", "consumer"
SUPERVISOR = "supervisor"
JOIN = "--join"  # what stands for a worker's name that is yet to be chosen
CLAIM = "claim"  # of what a producer tells: that it has joined, and not begun yet
JOINING = "joining"  # the lock of a producer that chooses its name, and of a process that keeps roles out
LOOK_S = 1.0
CHOOSING_S = 10.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def role_of(worker: str) -> str:
    return PRODUCER if worker == WORKER else f"{PRODUCER}-{worker}"


def worker_of(role: str) -> str:
    return role.removeprefix(PRODUCER).removeprefix("-") or WORKER


def is_producer(role: str) -> bool:
    return role.partition("-")[0] == PRODUCER


def started_roles(config: RunConfig) -> list[str]:
    """The producers that `paceline train` starts."""
    return [role_of(str(number)) for number in range(config.machine.producers)]


def known_roles(directory: Path) -> list[str]:
    """The consumer, and every producer that ever was on this host: each has left its lock."""
    numbers = [path.stem.removeprefix(f"{PRODUCER}-") for path in directory.glob(f"{PRODUCER}-*.lock")]
    joined = sorted(int(number) for number in numbers if number.isdecimal())
    return [PRODUCER, *(role_of(str(number)) for number in joined), CONSUMER]


def about_this_process(directory: Path) -> dict[str, Any]:
    """What a producer tells of itself. `directory`: the run's on this host."""
    place = {"host": socket.gethostname(), "directory": str(directory.absolute())}
    return {**place, "pid": os.getpid(), "boot": boot_id()}


def boot_id() -> str:
    """Which start of which machine this is; "" if unknown."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def elsewhere(facts: Mapping[str, Any], directory: Path) -> list[str]:
    """The workers that have told of themselves from other places, and are not known to have ended.

    A place is a host and the run's directory on it. Whether a worker of this place is live its lock says.
    """
    here = about_this_process(directory)
    return [
        worker
        for worker, told in producers_in(facts).items()
        if any(told.get(key, here[key]) != here[key] for key in ("host", "directory"))
    ]


def take_from(ledger: Ledger, workers: Iterable[str], why: str) -> None:
    """Return the leases of these workers, and refuse whatever they still do.

    A process that takes a worker's role at the same moment tells of itself, which is left as it is.
    """
    for worker in workers:
        fence = ledger.acquire(producer_role(worker), why)
        with suppress(FencedError):
            repeated(ledger.set_facts, fence.call(1), {producer_fact(worker): None})


def speaks(ledger: Ledger, worker: str, within_s: float, should_stop: Callable[[], bool]) -> bool:
    """Whether this worker says something new within that time of this process's clock; True if asked to stop.

    A worker that was killed with its host (or its container, whose name never returns) says nothing.
    """
    told, deadline = producers_in(ledger.facts()).get(worker), ledger.clock() + within_s
    while (left := deadline - ledger.clock()) > 0 and not should_stop():
        mark = ledger.lsn()
        now = producers_in(ledger.facts()).get(worker)
        if now != told:
            return now is not None
        ledger.wait(mark, min(left, LOOK_S))
    return should_stop()


def take_from_the_dead(config: RunConfig, ledger: Ledger) -> None:
    """Return the leases of producers of this host that have no process, before some are started.

    A lease may also be of one whose fact is gone, because a start was killed in here. Those that are started
    return their own leases.
    """
    now, started = ledger.snapshot(), started_roles(config)
    told = producers_in(now.facts)
    ever = {role.partition(":")[2] for role in now.epochs if role != CONSUMER}
    workers = (ever if now.prompts.leased else told.keys()) - set(elsewhere(now.facts, config.run.directory))
    dead = sorted(w for w in workers if live_holder(config.run.directory, role_of(w)) is None)
    take_from(ledger, (w for w in dead if role_of(w) not in started), "its process was gone at a start")
    left = {producer_fact(w): None for w in dead if w in told and role_of(w) in started}
    write_facts(ledger, {**left, PRODUCERS_STARTED: config.machine.producers})


def take_from_killed(config: RunConfig, ledger: Ledger, role: str) -> None:
    """Return the leases of a producer whose process was seen to end, if there is another one to take them.

    Its next process would return them only once it has loaded its target, the others after the time-out.
    """
    told, worker = producers_in(ledger.facts()), worker_of(role)
    is_dead = live_holder(config.run.directory, role) is None  # and its name is no other process's
    if worker in told and told.keys() - {worker} and is_dead:
        take_from(ledger, [worker], "its process has ended")


def _alone_to_choose(directory: Path) -> RoleLock:
    """Choosing a name takes a moment, and several may be started at once; a start that changes what binds the
    run may take longer."""
    deadline = monotonic() + CHOOSING_S
    while True:
        try:
            return RoleLock(directory, JOINING)
        except RunBusyError:
            if monotonic() > deadline:
                raise RunBusyError(
                    f"For {CHOOSING_S:g} seconds another process has been choosing a producer's name in "
                    f"{directory}, or changing what binds the run.",
                    why="Two producers of one name would take each other's place.",
                    next="run the same command again when that process has ended or gone on.",
                ) from None
            sleep(0.05)


def join(config: RunConfig) -> RoleLock:
    """Take the first free name for one more producer of a run that is going on.

    Raises ConfigError if the run has not begun or is complete; RunBusyError if another one keeps choosing.
    """
    directory = config.run.directory
    facts = config.view_ledger().facts()
    if facts.get(COMPLETED_STEP) is not None:
        raise ConfigError(
            f"The run in {directory} is complete.",
            why="It needs no further producer.",
            next=f"paceline status {directory}",
        )
    choosing = _alone_to_choose(directory)
    try:
        with closing(config.open_ledger(joins=True)) as ledger:
            return _first_free(config, ledger)
    finally:
        choosing.release()


class KeptName:
    """While entered, and until `end`, a producer that joined says that it lives, while it loads its target.

    Else the others would take it for dead, and its name could be given to another one. It says so under an
    epoch of its own: a process that wakes up late writes nothing over what its successor tells.
    """

    def __init__(self, ledger: Ledger, worker: str, timeout_s: float) -> None:
        self._ledger, self._fact = ledger, producer_fact(worker)
        told = producers_in(ledger.facts()).get(worker, {})
        is_mine = told.get("pid") == os.getpid() and told.get("host") == socket.gethostname()
        self._claim = told.get(CLAIM) if is_mine else None
        self._fence: Fence | None = None
        if self._claim is not None:
            self._fence = ledger.acquire(producer_role(worker), f"{told['host']}:{told['pid']}")
        self._pause_s, self._end = timeout_s / BEATS_PER_TIMEOUT, Event()
        self._thread = Thread(target=self._tell_until_end, name="paceline-joining", daemon=True)

    def __enter__(self) -> KeptName:
        if self._claim is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """From now on it says nothing more."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _tell_until_end(self) -> None:
        beats = count(1)
        while not self._end.wait(self._pause_s):
            try:
                told = self._ledger.facts().get(self._fact) or {}
                if told.get(CLAIM) != self._claim:
                    return  # it was taken for dead all the same
                self._ledger.set_facts(self._fence, {self._fact: {**told, "beat": next(beats)}})
            except FencedError:
                return  # and meanwhile
            except LedgerError:
                continue  # it may be away for a while


def _first_free(config: RunConfig, ledger: Ledger) -> RoleLock:
    """The lock says that no producer has the name here, and the ledger that none has it elsewhere."""
    directory, facts = config.run.directory, ledger.facts()
    about = {**about_this_process(directory), CLAIM: secrets.token_hex(8)}
    for number in count(max(1, config.machine.producers, facts.get(PRODUCERS_STARTED, 0))):
        worker = str(number)
        if worker in elsewhere(facts, directory):
            continue
        try:
            lock = RoleLock(directory, role_of(worker))
        except RunBusyError:
            continue
        name = producer_fact(worker)
        if facts.get(name) is not None:  # a dead process of this place has left it
            write_facts(ledger, {name: about})
            return lock
        if ledger.set_facts(None, {name: about}, settle=True)[name] == about:
            return lock
        lock.release()  # another host was faster
    raise AssertionError("there is a free number")
