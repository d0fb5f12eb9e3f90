"""One light run as real processes that are killed, stopped and started again until it is complete.

The parent forks a producer and a consumer, arms each with its next fault, and restarts a role that died.
A stopped process gets a successor and is then woken: a zombie, none of whose transactions may be
committed. The parent decides nothing about samples; it is a supervisor that follows a plan of faults. A
run that does not end in time is a violation, too.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from paceline import crashpoints
from paceline.errors import FencedError, PacelineError, RanksError
from paceline.ledger.facts import COMPLETED_STEP
from paceline.ledger.locks import RoleLock
from paceline.roles.trainers import role_of_rank
from paceline.testing import kill_points
from paceline.testing.light_adapters import LightFeatureStore
from paceline.testing.light_run import LightRun, RunShape
from paceline.testing.light_state import damage_head, look
from paceline.testing.socket_link import SocketLink, socket_links

DEADLINE_S = 240.0  # a tenth of a second does on an idle machine; on a busy one a minute may not
QUIET_MS = 40  # no news for so long: a stopped process may hold a lock, so it is woken up
LINK_S = 4.0  # the others wait for a rank that is stopped
DONE, FENCED, STALE, FAILED, BROKEN, LOST = range(10, 16)
FENCED_CALLS = frozenset(
    (
        *("extend", "lease", "give_back", "end_stream", "reserve", "commit", "swept", "report_lost"),
        *("plan", "head", "fall_back", "retire", "quarantine", "release"),
    )
)
NOTED = {
    "ledger.set_facts(isolation).after": "isolation held",
    "ledger.between_archives@retire": "history archived",
    "ledger.fall_back.after": "fell back",
}


@dataclass(frozen=True)
class Fault:
    """What happens when `victim` reaches `point` for the `turn`-th time in one of its lives.

    kill; kill_both: the other role, too; stop: it is continued `wake_after` events after a successor has
    taken its role; reboot: everything dies and the features are gone; damage_head: killed, and the newest
    checkpoint is deleted or altered; lose: a feature file is deleted or altered, nobody dies; server: the
    server that the ledger is on is killed and started again, while the victim holds still.
    """

    victim: str
    kind: str
    point: str
    turn: int = 1
    wake_after: int = 0
    salt: int = 0


@dataclass
class Child:
    pid: int
    role: str
    faults: list[Fault]  # what it is armed with, in this order
    pidfd: int
    stale: mmap.mmap  # one byte, written by the parent: a successor has taken the role over
    acquired: bool = False
    stopped: bool = False
    fired: Fault | None = None
    wake_in: int = 0
    quiet_ms: int = 0  # since it was stopped, without news from anybody


class Violation(AssertionError):  # noqa: N818 (it is what the tests look for)
    """The run broke a promise."""


def producers_of(shape: RunShape) -> list[str]:
    """The names of its producers' roles, and of the workers."""
    return ["producer"] if shape.producers == 1 else [f"producer-{n}" for n in range(shape.producers)]


def ranks_of(shape: RunShape) -> list[str]:
    """The names of its ranks' roles."""
    return [role_of_rank(rank) for rank in range(shape.ranks)]


def patience_ms(fault: Fault | None) -> int:
    """How long a quiet run waits for a stopped process: inside a transaction it holds everybody up."""
    inside = fault is not None and fault.point.startswith(("ledger.after_begin", "ledger.before_commit"))
    return QUIET_MS if inside else 50 * QUIET_MS


def qualified(name: str) -> str:
    """A point inside a transaction of the ledger, with the call whose transaction it is."""
    part, _, place = name.partition(".")
    if part != "ledger" or "." in place:
        return name
    return f"{name}@{kill_points.open_call().removeprefix('ledger.')}"


class Watcher:
    """In a child: executes its fault, reports what the parent wants to know."""

    def __init__(self, run: LightRun, tell: int, faults: Sequence[Fault], stale: mmap.mmap) -> None:
        self._run, self._tell, self._faults, self._stale = run, tell, list(faults), stale
        self.reached: Counter[str] = Counter()
        self._stopped_midway = False

    def __call__(self, name: str) -> None:
        name = qualified(name)
        self.reached[name] += 1
        if name in NOTED:
            self.send("noted", what=NOTED[name])
        if name == "ledger.acquire.after":
            self.send("acquired", epoch=kill_points.answer().epoch)
        if self._stale[0] and self._is_accepted(name) and not self._came_before_the_stop():
            self.send("violation", what=f"a zombie committed {name}")
        if self._faults and name == self._faults[0].point and self.reached[name] == self._faults[0].turn:
            self.send("fired")
            self._strike(self._faults.pop(0))

    def _is_accepted(self, name: str) -> bool:
        """Whether the ledger has just made a change that carried this process's fence.

        A file's ledger has a point in the transaction; a server has answered.
        """
        if not self._run.server:
            return name.startswith("ledger.after_commit")
        part, _, call = name.removesuffix(".after").partition(".")
        return part == "ledger" and name.endswith(".after") and call in FENCED_CALLS

    def _came_before_the_stop(self) -> bool:
        """Stopped by its other thread, this one may have committed before and be about to say so."""
        before, self._stopped_midway = self._stopped_midway, False
        return before

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "server":
            self.reached.clear()
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        if fault.kind == "lose":
            self.reached.clear()
            if self._run.feature_folder.exists():
                bare = LightFeatureStore(self._run.feature_folder, owner=False)
                bare.damage(random.Random(fault.salt))
            return
        self._stopped_midway = threading.current_thread() is not threading.main_thread()
        number = signal.SIGSTOP if fault.kind == "stop" else signal.SIGKILL
        os.kill(os.getpid(), number)
        self._faults.clear()  # what follows is meant for the successor

    def report(self, event: str, **fields: Any) -> None:
        kept = {key: value for key, value in fields.items() if isinstance(value, int)}
        self.send("event", event=event, **kept)

    def send(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"pid": os.getpid(), "kind": kind, **fields})[:4000] + "\n"
        os.write(self._tell, line.encode())  # below PIPE_BUF, so it arrives whole


@dataclass
class KilledRun:
    """Drives `run` through `faults` to its end; `counts` and `points` say what happened on the way."""

    run: LightRun
    faults: Sequence[Fault]
    counts: Counter[str] = field(default_factory=Counter)
    restart: Callable[[], None] = lambda: None  # kills the server, and starts it again

    def __post_init__(self) -> None:
        self.pending = list(self.faults)
        self._children: dict[int, Child] = {}
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)
        self._rest = b""
        self._producer_done = False
        self._complete = False
        self._newest: dict[str, int] = {}  # who took each role last
        self._epochs: Counter[str] = Counter()  # and as which of its holders
        self._steps_of: dict[int, int] = {}  # the process that last trained a step
        self.has_zombies = any(fault.kind == "stop" for fault in self.faults)
        self.history: list[str] = []

        self._ranks_struck = False  # since they were started last

    @property
    def producers(self) -> list[str]:
        return producers_of(self.run.shape)

    @property
    def ranks(self) -> list[str]:
        return ranks_of(self.run.shape)

    # -- the supervisor --------------------------------------------------------------------

    def drive(self) -> None:
        """To the end. Raises Violation."""
        deadline = time.monotonic() + DEADLINE_S
        try:
            while not (self._complete and not self._children):
                self._staff()
                if time.monotonic() > deadline:
                    raise Violation(f"the run did not end within {DEADLINE_S:g} s")
                self._look(QUIET_MS)
        finally:
            with suppress(Violation):
                for child in list(self._children.values()):
                    self._kill(child)
            os.close(self._read)
            os.close(self._write)

    def _staff(self) -> None:
        """Whoever is needed and not there is started; at the end every zombie is woken up."""
        if self._complete:
            for child in self._stopped():
                self._wake(child)
            return
        running = {child.role for child in self._children.values() if not child.stopped}
        for role in self.producers:
            if role not in running and not self._producer_done:
                self._start(role)
        if running.isdisjoint(self.ranks):
            self._ranks_struck = False
            links = socket_links(len(self.ranks), LINK_S if self.has_zombies else DEADLINE_S)
            for role in self.ranks:
                self._start(role, links)
            for link in links:
                link.leave()

    def _look(self, timeout_ms: int) -> None:
        ready = self._poll.poll(timeout_ms)
        self._hear()
        for child in list(self._children.values()):
            if child.pid in self._children:  # looking after one may end others
                self._look_after(child)
        for child in self._stopped():
            child.quiet_ms = 0 if ready else child.quiet_ms + timeout_ms
            if child.wake_in < 0 or child.quiet_ms >= patience_ms(child.fired):
                self._wake(child)
        if not ready and self._producer_done:
            self._producer_done = not self._producer_has_work()

    def _stopped(self) -> list[Child]:
        return [child for child in self._children.values() if child.stopped]

    # -- processes -------------------------------------------------------------------------

    def _start(self, role: str, links: Sequence[SocketLink] = ()) -> None:
        faults = [fault for fault in self.pending if fault.victim == role]
        stale = mmap.mmap(-1, 1)
        pid = os.fork()
        if pid == 0:
            self._work(role, faults, stale, links)
        pidfd = os.pidfd_open(pid)
        self._poll.register(pidfd, select.POLLIN)
        self._children[pid] = Child(pid, role, faults, pidfd, stale)
        self.counts["processes"] += 1
        self.history.append(f"{role} {pid} starts, armed with {faults[:1]}")

    def _work(self, role: str, faults: list[Fault], stale: mmap.mmap, links: Sequence[SocketLink]) -> None:
        """The child's life. Never returns."""
        watcher = Watcher(self.run, self._write, faults, stale)
        code = FAILED
        try:
            if not self.has_zombies:
                RoleLock(self.run.folder, role)
            crashpoints.watch(watcher)
            if role in self.ranks:
                self._train(self.ranks.index(role), watcher, links)
            else:
                self.run.produce(watcher.report, worker=role)
            code = DONE
        except RanksError:
            code = LOST
        except FencedError as error:
            watcher.send("refused", what=_refused_method(error))
            code = FENCED
        except PacelineError as error:
            watcher.send("failed", what=f"{type(error).__name__}: {error}")
        except BaseException:  # noqa: BLE001 (a child must not return into its parent's stack)
            code = BROKEN
            watcher.send("failed", what=traceback.format_exc()[-3000:])
        finally:
            os._exit(code)

    def _train(self, rank: int, watcher: Watcher, links: Sequence[SocketLink]) -> None:
        for link in links:
            if link.rank != rank:
                link.leave()  # or nobody would learn that its owner is dead
        if rank:
            self.run.follow(links[rank])
        else:
            self.run.consume(watcher.report, links[0])

    def _look_after(self, child: Child) -> None:
        pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED)
        if pid == 0:
            return
        if os.WIFSTOPPED(status):
            self._hear()
            if child.fired is not None and child.fired.kind == "server":
                self._kill_server(child)
                return
            child.stopped, child.wake_in = True, child.fired.wake_after if child.fired else 0
            self.history.append(f"{child.role} {pid} is stopped at {child.fired}")
            return
        self._hear()
        self._bury(child)
        if os.WIFSIGNALED(status):
            self.history.append(f"{child.role} {pid} was killed")
            if child.fired is None:
                raise Violation(f"the {child.role} died of signal {os.WTERMSIG(status)}, and nobody sent it")
            self._aftermath(child.fired)
            return
        code = os.WEXITSTATUS(status)
        self.history.append(f"{child.role} {pid} ends with {code}")
        if code == FAILED and self._newest.get(child.role, pid) != pid:
            code = STALE  # it lost its role while it ran; whatever it ran into then is its own affair
        if code in (FAILED, BROKEN):
            raise Violation(f"the {child.role} failed: {self.history[-2:]}")
        if code in (FENCED, STALE) and not self.has_zombies:
            raise Violation(f"the {child.role} was fenced, and nobody took its role: {self.history[-2:]}")
        if code == LOST and not (self._ranks_struck or self.has_zombies):
            raise Violation(f"the {child.role} lost a rank to which nothing had happened")
        if code == DONE:
            self._ended(child)

    def _ended(self, child: Child) -> None:
        if child.role == "consumer":
            self._complete = self._complete or self._is_true(COMPLETED_STEP)
        elif child.role not in self.ranks:
            self._producer_done = not self._producer_has_work()

    def _bury(self, child: Child) -> None:
        self._poll.unregister(child.pidfd)
        os.close(child.pidfd)
        child.stale.close()
        del self._children[child.pid]

    def _kill(self, child: Child) -> None:
        self._ranks_struck = self._ranks_struck or child.role in self.ranks
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        self._hear()
        self._bury(child)
        self.history.append(f"{child.role} {child.pid} is killed")

    def _wake(self, child: Child) -> None:
        """Continue a stopped process; a zombie if its role has been taken over meanwhile."""
        child.stopped = False
        if child.acquired and self._newest[child.role] != child.pid:
            child.stale[0] = 1
            self.counts["zombies"] += 1
        self.history.append(f"{child.role} {child.pid} is continued, stale={child.stale[0]}")
        os.kill(child.pid, signal.SIGCONT)

    def _kill_server(self, child: Child) -> None:
        self.restart()
        child.fired = None
        self.history.append(f"the server is killed and started again; {child.role} {child.pid} goes on")
        os.kill(child.pid, signal.SIGCONT)

    def _aftermath(self, fault: Fault) -> None:
        """What the fault does besides ending its victim."""
        if fault.kind in ("kill_both", "reboot"):
            for other in list(self._children.values()):
                if fault.kind == "reboot" or not other.stopped:
                    self._kill(other)
        if fault.kind == "reboot":
            shutil.rmtree(self.run.feature_folder, ignore_errors=True)
            self._producer_done = False
        if fault.kind == "damage_head" and not self._is_true(COMPLETED_STEP):  # then nobody would look
            damaged = damage_head(self.run, random.Random(fault.salt))
            self.counts["heads damaged"] += damaged
            self.history.append(f"the head is damaged: {damaged}")

    # -- news ------------------------------------------------------------------------------

    def _hear(self) -> None:
        try:
            while data := os.read(self._read, 1 << 16):
                self._rest += data
        except BlockingIOError:
            pass
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            message = json.loads(line)
            self._take(message, self._children[message["pid"]])
            for child in self._stopped():
                child.wake_in -= self._newest.get(child.role, child.pid) != child.pid

    def _take(self, message: dict[str, Any], child: Child) -> None:
        kind = message["kind"]
        self.history.append(f"{child.role} {line_of(message)}")
        if kind == "violation":
            raise Violation(message["what"])
        if kind == "fired":
            child.fired = child.faults.pop(0)
            self.pending.remove(child.fired)
            self.counts[f"faults: {child.fired.kind}"] += 1
            self._ranks_struck = self._ranks_struck or child.role in self.ranks
            self.counts["other ranks struck"] += child.role in self.ranks[1:]
        elif kind == "acquired":
            child.acquired = True
            # One that was stopped in between may tell it long after its successor did.
            if message["epoch"] > self._epochs[child.role]:
                self._epochs[child.role], self._newest[child.role] = message["epoch"], child.pid
        elif kind == "refused":
            self.counts[f"zombie rejected at {message['what']}"] += 1
        elif kind == "noted":
            self.counts[message["what"]] += 1
        elif kind == "event":
            self._count(message, child)

    def _count(self, message: dict[str, Any], child: Child) -> None:
        event, step = message["event"], message.get("step", 0)
        if event == "found":
            self.counts["intents revoked"] += message.get("intents", 0) > 0
            self.counts["orphan checkpoints found"] += message.get("orphan_checkpoints", 0) > 0
        elif event == "started":
            self.counts["orphan features swept"] += message["orphans"] > 0
        elif event == "step":
            self.counts["steps replayed"] += self._steps_of.get(step, child.pid) != child.pid
            self._steps_of[step] = child.pid
        elif event == "checkpoint":
            self.counts["checkpoints"] += 1
            last = -(-self.run.shape.prompts * self.run.shape.passes // self.run.shape.batch)
            self.counts["checkpoints on pressure"] += step % self.run.shape.interval > 0 and step != last
        elif event == "waiting_for_recapture":
            self.counts["missed by the consumer"] += 1
        elif event == "rolled_forward":
            self.counts["rolled forward"] += 1
        elif event == "made_room":
            self.counts["gave up samples to make room"] += 1
        may_be_work = event in ("fall_back", "waiting_for_recapture", "rolled_forward")
        if may_be_work and self._producer_done:
            self._producer_done = not self._producer_has_work()

    # -- the ledger, looked at -------------------------------------------------------------

    def _is_true(self, fact: str) -> bool:
        now = look(self.run)
        return now is not None and now.facts.get(fact, False) is not False

    def _producer_has_work(self) -> bool:
        """As in roles/supervisor.py."""
        now = look(self.run)
        return now is not None and bool(now.prompts.open or not now.closed)


def line_of(message: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in message.items())


def _refused_method(error: BaseException) -> str:
    """The ledger's method that refused, out of the traceback."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_name
        if "/ledger/stores/" in frame.f_code.co_filename and not name.startswith("_"):
            return str(frame.f_locals["method"].__name__) if name == "call" else name  # in `change`
    return "?"
