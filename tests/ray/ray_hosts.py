"""A real Ray cluster on hosts of this machine, and a run on it, whose parts can be killed.

A host is namespaces with a network, a name and a /dev/shm of its own (testing/network.py). What hosts share
is a folder with the run and its features, the ledger's server, and Ray's token.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from paceline.ledger.records import Snapshot
from paceline.ledger.stores.redis import RedisView
from paceline.roles.trainers import RANK, role_of_rank
from paceline.roles.workers import CONSUMER
from paceline.testing.network import Network
from paceline.testing.tiny_run import TinyRun
from paceline.testing.valkey_server import ValkeyServer

SERVER, HEAD, *NODES = HOSTS = ("ledgers", "head", "node-a", "node-b", "node-c")
NUM_SAMPLES = 200
WAIT_S = 480.0
STARTS = 4  # of a node, at most
BIN = Path(sys.executable).parent
KINDS = {  # of what a run is killed in, with the processes that are that kind
    "rank": ("consumer", "consumer-1", "train", "ray::TrainerAct"),
    "producer": ("producer", "produce", "ray::KeptActor"),
    "raylet": (),
    "command": (),
    "head": (),
}
# In every Python of the cluster: at a point that is armed, a role kills the raylet that it is under.
AT_A_POINT = """
import os, signal
from pathlib import Path

ARMED = Path(__file__).parent / "armed"

def seen(name):
    if name not in points:
        return
    try:
        (ARMED / name).unlink()
    except FileNotFoundError:
        return
    pid = os.getpid()
    while pid > 1:
        status = Path(f"/proc/{pid}/stat").read_text()
        pid = int(status.rpartition(")")[2].split()[1])
        if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet":
            os.kill(pid, signal.SIGKILL)
            return

points = os.listdir(ARMED)
if points:
    from paceline.crashpoints import watch
    watch(seen)
"""


def prompts(folder: Path) -> dict[str, Any]:
    return {"path": str(folder / "train.jsonl"), "rounds": NUM_SAMPLES // 20, "max_answer_tokens": 12}


AS_HEAD = ("--head", "--port=6379", "--include-dashboard=false", "--no-monitor")


class Cluster:
    """A Ray cluster whose head takes no role, and a run on it."""

    def __init__(self, folder: Path, model: Path, held: ExitStack) -> None:
        self.folder = folder
        self.token = secrets.token_hex(32)
        names = folder / "hosts"
        names.write_text(
            "127.0.0.1 localhost\n" + "".join(f"10.77.0.{n + 1} {name}\n" for n, name in enumerate(HOSTS))
        )
        mounts: dict[str, dict[str, Path]] = {}
        for name in HOSTS[1:]:
            (folder / f"ray-{name}").mkdir()
            mounts[name] = {"/etc/hosts": names}
        self.network = Network(HOSTS, mounts=mounts)
        held.callback(self.network.close)
        (folder / SERVER).mkdir()
        host = self.network.hosts[SERVER]
        self.server = held.enter_context(
            ValkeyServer(folder / SERVER, host.enter, port="6379", bind=host.address, protected_mode="no")
        )
        (folder / "features").mkdir()
        shutil.copytree(model, folder / "model")  # hosts hide /dev/shm
        self.run = TinyRun(
            folder / "run-files",
            folder / "model",
            prompts=prompts(folder / "run-files"),
            ledger={"store": "redis", "url": f"redis://{host.address}:6379/0"},
            features={"store": "directory", "directory": str(folder / "features"), "budget_mib": 8},
            machine={"producers": 2, "producer_timeout_s": 8},
            evaluation={"max_prompts": 1, "max_new_tokens": 4},
        )
        self.struck: list[str] = []
        self._sections = dict(self.run.config)
        self.armed = folder / "points" / "armed"  # a file for each point
        self.armed.mkdir(parents=True)
        (folder / "points" / "sitecustomize.py").write_text(AT_A_POINT)
        self.processes: dict[str, subprocess.Popen[str]] = {}
        held.callback(self._end_all)
        self.start(HEAD, *AS_HEAD, "--num-cpus=0")

    def set(self, **sections: dict[str, Any]) -> None:
        """Change the run file in these sections."""
        for name, values in sections.items():
            self.run.config[name] = {**self.run.config.get(name, {}), **values}
        self.run.write()

    def fresh(self) -> None:
        """Another run of the same settings on the same cluster, on which nothing is missing."""
        self.start_missing()
        name = f"run-{secrets.token_hex(4)}"
        self.struck = []
        for point in self.armed.iterdir():
            point.unlink()
        self.run.directory = self.folder / name
        self.run.config = {**self._sections, "run": {"name": name, "directory": str(self.run.directory)}}
        self.run.write()
        (self.folder / "driver.log").write_text("")

    def start_anew(self) -> None:
        """Another cluster, after the end of what is left of this one."""
        for host in HOSTS[1:]:
            self._end(host)
        self.start(HEAD, *AS_HEAD, "--num-cpus=0")
        for host in NODES[:2]:
            self.start(host)

    @property
    def address(self) -> str:
        return f"{self.network.hosts[HEAD].address}:6379"

    def environment(self, *, token: bool = True) -> dict[str, str]:
        paths = [str(self.folder / "points"), *filter(None, sys.path)]
        return {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(paths),
            "RAY_AUTH_MODE": "token" if token else "disabled",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_prestart_worker_first_driver": "0",  # processors are few here
            "RAY_TMPDIR": str(self.folder / "ray"),
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
        }

    def begin(self, host: str, *arguments: str, log: str, token: bool = True) -> subprocess.Popen[str]:
        with (self.folder / log).open("a") as out:
            return subprocess.Popen(
                arguments,
                env=self.environment(token=token),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=self.network.hosts[host].enter,
                start_new_session=True,
            )

    def start(self, host: str, *options: str, token: bool = True) -> None:
        """Start Ray's node on that host, with four processors, and wait for it.

        Ray gives a node up that takes more than 30 s, which it may on a machine with much other work.
        """
        more = options or (f"--address={self.address}", "--num-cpus=4")
        address = self.network.hosts[host].address
        arguments = [f"--node-ip-address={address}", "--object-store-memory=80000000", *more]
        log = self.folder / f"ray-{host}.log"
        if host in self.processes:
            self.processes[host].wait()  # it ends once its raylet has
        command = (str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments)
        for _ in range(STARTS):
            log.unlink(missing_ok=True)
            started = self.processes[host] = self.begin(host, *command, log=log.name, token=token)
            wait_until(lambda: started.poll() is not None or is_up(log), "a node")  # noqa: B023
            if is_up(log):
                return
            self._end(host)
        raise AssertionError(log.read_text())

    def start_missing(self) -> None:
        """Those of the first two nodes that have ended."""
        for host in NODES[:2]:
            if self.raylet(host) is None:
                self.start(host)

    def raylet(self, host: str) -> int | None:
        found = [pid for pid in below(self.processes[host].pid) if name_of(pid) == "raylet"]
        return found[0] if found else None

    def kill_raylet(self, host: str) -> None:
        raylet = self.raylet(host)
        if raylet is not None:
            self.struck.append(f"the raylet on {host}")
            os.kill(raylet, signal.SIGKILL)
            self.processes[host].wait()

    def kill_host(self, host: str, but: Sequence[int] = ()) -> None:
        """All processes on that host, at once."""
        self.struck.append(f"host {host}")
        self._end(host, but)

    def _end(self, host: str, but: Sequence[int] = ()) -> None:
        while found := [pid for pid in self.processes_on(host) if pid not in but]:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        if host in self.processes:
            self.processes[host].wait()

    def kill(self, *names: str, rng: random.Random | None = None) -> str:
        """One process of these names on a node, if there is one; what was struck."""
        found = [(pid, name, host) for host in NODES for pid, name in self.named_on(host) if name in names]
        if not found:
            return ""
        pid, name, host = rng.choice(found) if rng else found[0]
        self.struck.append(f"{name} on {host}")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self.struck[-1]

    def strike(self, kind: str, rng: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        """Kill one of that kind; the command that follows the run from now on."""
        host, again = rng.choice(NODES[:2]), kind in ("command", "head")
        if kind == "raylet":
            rng.choice((self.kill_raylet, self.kill_host))(host)
        elif kind == "head":  # with the command, which was typed there; its nodes go on alone for a moment
            self.kill_host(HEAD)
            time.sleep(rng.uniform(0.0, 12.0))
            self.start_anew()
        elif kind == "command":
            self.struck.append(kind)
            driver.kill()
        else:
            self.kill(*KINDS[kind], rng=rng)
        if not again:
            return driver
        driver.wait()
        return self.paceline("train")

    def processes_on(self, host: str) -> list[int]:
        """By their network namespace."""
        wanted = os.fstat(self.network.hosts[host].namespaces[0]).st_ino
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (path / "ns" / "net").stat().st_ino == wanted:
                    found.append(int(path.name))
        return found

    def named_on(self, host: str) -> Iterator[tuple[int, str]]:
        """The roles and commands of a run there, and what keeps them going."""
        for pid in self.processes_on(host):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if words[1:2] == ["-m"] and words[2].startswith("paceline"):
                    name = words[3] if words[2] == "paceline" else words[2].rpartition(".")[2]
                    yield pid, role_of_rank(rank_of(pid)) if name == CONSUMER else name
                elif words[0].startswith("ray::"):
                    yield pid, name_of(pid)

    def client_servers(self) -> set[int]:
        """The processes on the head that speak for a client each."""
        found = set()
        for pid in self.processes_on(HEAD):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if words[1:3] == ["-m", "ray.util.client.server"] and "--mode=specific-server" in words:
                    found.add(pid)
        return found

    def commands_on(self, host: str) -> list[str]:
        return [name for _, name in self.named_on(host) if not name.startswith("ray::")]

    def commands(self) -> list[str]:
        return [name for host in NODES for name in self.commands_on(host)]

    def paceline(
        self, verb: str, *, address: str = "", host: str = HEAD, token: bool = True
    ) -> subprocess.Popen[str]:
        """Type the command on that host."""
        words = [sys.executable, "-m", "paceline", verb, str(self.run.run_file)]
        words += ["--on", address or self.address]
        return self.begin(host, *words, log="driver.log", token=token)

    def said(self) -> str:
        log = self.folder / "driver.log"
        return log.read_text() if log.exists() else ""

    def now(self) -> Snapshot | None:
        try:
            view = RedisView(self.server.url, self.run.config["run"]["name"], patience_s=10.0)
        except Exception:  # noqa: BLE001 (there is none yet)
            return None
        try:
            return view.snapshot()
        finally:
            view.close()

    def trained(self) -> int:
        now = self.now()
        return 0 if now is None else now.samples_trained

    def host_of(self, role: str) -> str | None:
        """Where the role is live."""
        return next((host for host in NODES if role in self.commands_on(host)), None)

    def weights(self) -> dict[str, Any]:
        now = self.now()
        assert now is not None
        assert now.head is not None
        assert now.committed == now.samples_trained == NUM_SAMPLES
        return load_file(self.run.directory / "checkpoints" / now.head.name / "draft.safetensors")

    def _end_all(self) -> None:
        for host in HOSTS[1:]:
            self._end(host)


def is_up(log: Path) -> bool:
    return "Ray runtime started" in log.read_text()


def below(pid: int) -> Iterator[int]:
    """The processes that this one has started, and those that they have."""
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from below(int(child))


def name_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def rank_of(pid: int) -> int:
    """Of a trainer; 0 if it trains alone."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(one[len(RANK) + 1 :]) for one in variables if one.startswith(f"{RANK}=".encode())), 0)


def wait_until(condition: Callable[[], Any], what: str, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        assert process is None or process.poll() is None, f"ended before {what}"
        time.sleep(0.05)
