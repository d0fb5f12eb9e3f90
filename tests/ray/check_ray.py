"""Runs on a real Ray cluster of several hosts: `make test-ray` runs it; the fast suite does not.

A host is namespaces of this machine, with a network, a name and a /dev/shm of its own (testing/network.py).
What hosts share is a folder with the run and its features, the ledger's server, and Ray's token. Every run
ends in the weights of the same run on one host, bit for bit, whatever was killed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from paceline.ledger.records import Snapshot
from paceline.ledger.stores.redis import RedisView
from paceline.testing.network import Network
from paceline.testing.small_run import same_bits
from paceline.testing.tiny_run import TinyRun
from paceline.testing.valkey_server import ValkeyServer

SERVER, HEAD, *NODES = HOSTS = ("ledgers", "head", "node-a", "node-b", "node-c")
NUM_SAMPLES = 200
WAIT_S = 240.0
BIN = Path(sys.executable).parent
RECORD = os.environ.get("RAY_RECORD")  # a JSON file that gets what was done


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
            prompts={
                "path": str(folder / "run-files" / "train.jsonl"),
                "rounds": NUM_SAMPLES // 20,
                "max_answer_tokens": 12,
            },
            ledger={"store": "redis", "url": f"redis://{host.address}:6379/0"},
            features={"store": "directory", "directory": str(folder / "features"), "budget_mib": 8},
            machine={"producers": 2, "producer_timeout_s": 8},
        )
        self.processes: dict[str, subprocess.Popen[str]] = {}
        held.callback(self._end_all)
        self.start(HEAD, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")

    @property
    def address(self) -> str:
        return f"{self.network.hosts[HEAD].address}:6379"

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder / "ray"),
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
        }

    def begin(self, host: str, *arguments: str, log: str) -> subprocess.Popen[str]:
        with (self.folder / log).open("a") as out:
            return subprocess.Popen(
                arguments,
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=self.network.hosts[host].enter,
                start_new_session=True,
            )

    def start(self, host: str, *options: str) -> None:
        """Start Ray's node on that host, with three processors, and wait for it."""
        more = options or (f"--address={self.address}", "--num-cpus=3")
        address = self.network.hosts[host].address
        arguments = [f"--node-ip-address={address}", "--object-store-memory=80000000", *more]
        log = self.folder / f"ray-{host}.log"
        log.unlink(missing_ok=True)
        command = (str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments)
        self.processes[host] = self.begin(host, *command, log=log.name)
        wait_until(lambda: "Ray runtime started" in log.read_text(), "a node", self.processes[host])

    def raylet(self, host: str) -> int | None:
        found = [pid for pid in below(self.processes[host].pid) if name_of(pid) == "raylet"]
        return found[0] if found else None

    def kill_raylet(self, host: str) -> None:
        raylet = self.raylet(host)
        assert raylet is not None
        os.kill(raylet, signal.SIGKILL)

    def kill_host(self, host: str) -> None:
        """All processes on that host, at once."""
        for pid in self.processes_on(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes_on(self, host: str) -> list[int]:
        """By their network namespace."""
        wanted = os.fstat(self.network.hosts[host].namespaces[0]).st_ino
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (path / "ns" / "net").stat().st_ino == wanted:
                    found.append(int(path.name))
        return found

    def commands_on(self, host: str) -> list[str]:
        """The roles that are live there."""
        found = []
        for pid in self.processes_on(host):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                found += [words[2].removeprefix("paceline.roles.") for _ in (0,) if words[1:2] == ["-m"]]
        return found

    def paceline(self, verb: str, *options: str, address: str = "") -> subprocess.Popen[str]:
        """Type the command on the head's host."""
        words = [verb, str(self.run.run_file), "--on", address or self.address, *options]
        return self.begin(HEAD, sys.executable, "-m", "paceline", *words, log="driver.log")

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
            for _ in range(3):
                self.kill_host(host)
                time.sleep(0.1)
        for process in self.processes.values():
            process.wait()


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


def wait_until(condition: Callable[[], Any], what: str, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        assert process is None or process.poll() is None, f"ended before {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def wanted(tiny_model: Path) -> dict[str, Any]:
    """The weights of the run on one host, which nothing disturbs."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        prompts = {"path": f"{name}/train.jsonl", "rounds": NUM_SAMPLES // 20, "max_answer_tokens": 12}
        run = TinyRun(Path(name), tiny_model, prompts=prompts)
        return run.train_here()


@pytest.fixture
def cluster(tiny_model: Path) -> Iterator[Cluster]:
    with ExitStack() as held:
        name = held.enter_context(
            tempfile.TemporaryDirectory(prefix="pr-", dir="/tmp", ignore_cleanup_errors=True)
        )
        made = Cluster(Path(name), tiny_model, held)
        yield made
        sys.stdout.write(made.said())  # pytest shows it if the test failed


def finished(cluster: Cluster, driver: subprocess.Popen[str], wanted: dict[str, Any]) -> None:
    code = driver.wait(timeout=WAIT_S)
    assert code == 0, cluster.said()
    assert same_bits(cluster.weights(), wanted)


def test_a_raylet_is_killed_and_the_weights_are_those_of_one_host(
    cluster: Cluster, wanted: dict[str, Any]
) -> None:
    """The one under the trainer: it goes on another node."""
    for host in NODES[:2]:
        cluster.start(host)
    driver = cluster.paceline("train")
    wait_until(lambda: cluster.trained() > 0, "a trained sample", driver)
    first = cluster.host_of("consumer")
    assert first is not None
    cluster.kill_raylet(first)
    finished(cluster, driver, wanted)
