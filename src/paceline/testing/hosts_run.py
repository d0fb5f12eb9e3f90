"""A light run on several hosts: three producers, a consumer and the ledger's server, each on its own.

The hosts share a folder for features and checkpoints; all else goes over the network, which is harmed while
the run goes on. A process that gave up is started again, as a supervisor does it. Nobody else helps.
"""

from __future__ import annotations

import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from paceline.errors import FencedError, LedgerError, UnknownResultError
from paceline.ledger.facts import COMPLETED_STEP
from paceline.testing.light_run import LightRun, RunShape, expected_steps, head_of, uninterrupted
from paceline.testing.light_state import look
from paceline.testing.network import Network
from paceline.testing.valkey_server import ValkeyServer

SERVER, CONSUMER = "server", "trainer"
PRODUCERS = ("producer-a", "producer-b", "producer-c")
HOSTS = (SERVER, CONSUMER, *PRODUCERS)
PORT = 6379
REPLY_S = 0.6  # how long a client waits for a reply: less than most partitions last
PATIENCE_S = 2.0  # how long for a server that is away: less than some last
DEADLINE_S = 240.0
LOOK_S = 0.01
DONE, GAVE_UP, FENCED, BROKEN = range(10, 14)
SHAPE = RunShape(prompts=60, group=3, batch=3, passes=1, interval=2)


class Violation(AssertionError):  # noqa: N818 (it is what the tests look for)
    """The run broke a promise."""


@dataclass(frozen=True)
class Trouble:
    """What happens once the ledger has `after` changes; its end comes `lasts_s` later.

    `apart`: hosts that reach nobody and that nobody reaches. `lost`, `doubled`, `delay_s`: of packets.
    `killed`: the server is killed in the beginning, and started again at the end.
    """

    after: int
    lasts_s: float
    apart: frozenset[str] = frozenset()
    lost: float = 0.0
    doubled: float = 0.0
    delay_s: float = 0.0
    killed: bool = False


@dataclass
class HostsRun:
    network: Network
    folder: Path
    troubles: Sequence[Trouble]
    shape: RunShape = SHAPE
    jumping: frozenset[str] = frozenset()  # hosts whose clocks do
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        host = self.network.hosts[SERVER]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SERVER).mkdir()
        self.server = ValkeyServer(
            self.folder / SERVER, host.enter, port=str(PORT), bind=host.address, protected_mode="no"
        )
        options = f"socket_timeout={REPLY_S}&socket_connect_timeout={REPLY_S}"
        url = f"redis://{host.address}:{PORT}/0?{options}"
        self.run = LightRun(self.folder / "run", self.shape, url, PATIENCE_S)
        self.run.folder.mkdir()
        self._roles: dict[int, str] = {}
        self._done: set[str] = set()

    # -- the supervisor --------------------------------------------------------------------

    def drive(self) -> None:
        """To the end. Raises Violation."""
        deadline, waiting, ends_at = time.monotonic() + DEADLINE_S, list(self.troubles), 0.0
        current: Trouble | None = None
        try:
            while len(self._done) < len(HOSTS) - 1:
                self._staff()
                self._bury()
                if current is None and waiting and self._num_changes() >= waiting[0].after:
                    current = waiting.pop(0)
                    self._begin(current)
                    ends_at = time.monotonic() + current.lasts_s
                elif current is not None and time.monotonic() > ends_at:
                    self._end(current)
                    current = None
                if time.monotonic() > deadline:
                    raise Violation(f"the run did not end within {DEADLINE_S:g} s: {self._roles}")
                time.sleep(LOOK_S)
        finally:
            if current is not None:
                self._end(current)
            for pid in self._roles:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
        self.counts["troubles that struck"] += len(self.troubles) - len(waiting)

    def _staff(self) -> None:
        for host in (CONSUMER, *PRODUCERS):
            if host not in self._done and host not in self._roles.values():
                pid = os.fork()
                if pid == 0:
                    self._live(host)
                self._roles[pid] = host
                self.counts["processes"] += 1

    def _bury(self) -> None:
        for pid, host in list(self._roles.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self._roles[pid]
            code = os.waitstatus_to_exitcode(status)
            if code == GAVE_UP:
                self.counts["gave up, and was started again"] += 1
            elif code == DONE:
                self._done.add(host)
            else:
                raise Violation(f"{host} ended with {code}; see its text above")

    def _live(self, host: str) -> None:
        """A role's process. Never returns."""
        code = BROKEN
        try:
            self.network.hosts[host].enter()
            if host in self.jumping:
                jump()
            work = self.run.consume if host == CONSUMER else partial(self.run.produce, worker=host)
            work()
            code = DONE
        except FencedError:
            code = FENCED
            traceback.print_exc(file=sys.stderr)
        except (UnknownResultError, LedgerError):
            code = GAVE_UP
        except BaseException:  # noqa: BLE001 (a child must not return into its parent's stack)
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)

    # -- troubles --------------------------------------------------------------------------

    def _num_changes(self) -> int:
        """By the server's own socket, which no network harms."""
        now = look(LightRun(self.run.folder, self.shape, self.server.url, patience_s=0.0))
        return 0 if now is None else now.lsn

    def _begin(self, trouble: Trouble) -> None:
        network = self.network
        network.apart, network.lost = trouble.apart, trouble.lost
        network.doubled, network.delay_s = trouble.doubled, trouble.delay_s
        if trouble.killed:
            self.server.kill()

    def _end(self, trouble: Trouble) -> None:
        network = self.network
        network.apart, network.lost, network.doubled, network.delay_s = frozenset(), 0.0, 0.0, 0.0
        if trouble.killed:
            self.server.start()

    # -- the end ---------------------------------------------------------------------------

    def check(self) -> None:
        """Every sample trained once, the weights of the undisturbed run, and nothing left behind."""
        run, shape = LightRun(self.run.folder, self.shape, self.server.url), self.shape
        wanted = uninterrupted(shape, self.folder / "undisturbed")
        ledger = run.open_ledger()
        found, now, owned = head_of(ledger, run.checkpoints), ledger.snapshot(), ledger.ownership()
        visits = [sample.sample_id for trained in ledger.history() for sample in trained.samples]
        ledger.close()
        wrong = {
            "weights": found.weights != wanted.weights,
            "steps": found.trained != [step for step in expected_steps(shape) if step],
            "lineage": found.chain != wanted.chain,
            "visits": sorted(visits) != sorted(shape.sample_ids * shape.passes),
            "not complete": COMPLETED_STEP not in now.facts,
            "intents": owned.promised or owned.revoked,
            "samples and bytes": now.usage.resident_samples or now.usage.resident_bytes or now.lost,
            "failed prompts": now.prompts.failed or now.prompts.open,
            "features": run.open_features(owner=False).left(),
        }
        if found_wrong := {what: value for what, value in wrong.items() if value}:
            raise Violation(f"after the run: {found_wrong}")

    def close(self) -> None:
        self.server.stop()


def jump() -> None:
    """From now on this process's wall clock is up to an hour off, by another amount at every look."""
    now, rng = time.time, random.Random(os.getpid())
    time.time = lambda: now() + rng.uniform(-3600.0, 3600.0)
    time.time_ns = lambda: int(1e9 * time.time())
