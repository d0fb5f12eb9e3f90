"""Runs on a real Ray cluster of several hosts: `make test-ray` runs it; the fast suite does not.

A host is namespaces of this machine, with a network, a name and a /dev/shm of its own (testing/network.py).
What hosts share is a folder with the run and its features, the ledger's server, and Ray's token. Every run
ends in the weights of the same run on one host, bit for bit, whatever was killed.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
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
SEEDS = int(os.environ.get("RAY_SEEDS", "3"))  # runs with kills at random times
KILLS_A_RUN = 4
BIN = Path(sys.executable).parent
RECORD = os.environ.get("RAY_RECORD")  # a JSON file that gets what was done
KILLS: dict[str, Any] = {}  # by test
PROCESSES = ("train", "consumer", "producer", "produce", "ray::TrainerAct", "ray::KeptActor")
# In every Python of the cluster: at the point that a file names, a role kills the raylet that it is under.
AT_A_POINT = """
import os, signal
from pathlib import Path

FOLDER = Path(__file__).parent

def seen(name):
    if name != point:
        return
    try:
        (FOLDER / "now").unlink()
    except FileNotFoundError:
        return
    pid = os.getpid()
    while pid > 1:
        status = Path(f"/proc/{pid}/stat").read_text()
        pid = int(status.rpartition(")")[2].split()[1])
        if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet":
            os.kill(pid, signal.SIGKILL)
            return

try:
    point = (FOLDER / "now").read_text()
except OSError:
    point = None
if point:
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
        )
        self.struck: list[str] = []
        self._sections = dict(self.run.config)
        (folder / "points").mkdir()
        (folder / "points" / "sitecustomize.py").write_text(AT_A_POINT)
        self.processes: dict[str, subprocess.Popen[str]] = {}
        held.callback(self._end_all)
        self.start(HEAD, *AS_HEAD, "--num-cpus=0")

    def fresh(self) -> None:
        """Another run of the same settings on the same cluster, on which nothing is missing."""
        for host in NODES[:2]:
            if self.raylet(host) is None:
                self.start(host)
        name = f"run-{secrets.token_hex(4)}"
        self.struck = []
        self.run.directory = self.folder / name
        self.run.config = {**self._sections, "run": {"name": name, "directory": str(self.run.directory)}}
        self.run.write()
        (self.folder / "driver.log").write_text("")

    def start_anew(self) -> None:
        for host in HOSTS[1:]:
            self.kill_host(host)
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
        """Start Ray's node on that host, with three processors, and wait for it."""
        more = options or (f"--address={self.address}", "--num-cpus=3")
        address = self.network.hosts[host].address
        arguments = [f"--node-ip-address={address}", "--object-store-memory=80000000", *more]
        log = self.folder / f"ray-{host}.log"
        log.unlink(missing_ok=True)
        if host in self.processes:
            self.processes[host].wait()  # it ends once its raylet has
        command = (str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments)
        self.processes[host] = self.begin(host, *command, log=log.name, token=token)
        wait_until(lambda: "Ray runtime started" in log.read_text(), "a node", self.processes[host])

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
        while found := [pid for pid in self.processes_on(host) if pid not in but]:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        if host in self.processes:
            self.processes[host].wait()

    def kill(self, host: str, name: str) -> bool:
        """One process of that name there, if there is one."""
        for pid, found in self.named_on(host):
            if found == name:
                self.struck.append(f"{name} on {host}")
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return True
        return False

    def strike(self, rng: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        """Kill something; the command that follows the run from now on."""
        host, what = rng.choice(NODES[:2]), rng.choice((*PROCESSES, "raylet", "host", "command"))
        if what == "raylet":
            self.kill_raylet(host)
        elif what == "host":
            self.kill_host(host)
        elif what == "command":
            self.struck.append(what)
            driver.kill()
            driver.wait()
            return self.paceline("train")
        elif not self.kill(NODES[0], what):
            self.kill(NODES[1], what)
        return driver

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
                    yield pid, words[3] if words[2] == "paceline" else words[2].rpartition(".")[2]
                elif words[0].startswith("ray::"):
                    yield pid, name_of(pid)

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
            self.kill_host(host)


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
def wanted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights of the run on one host, which nothing disturbs."""
    folder = tmp_path_factory.mktemp("wanted")
    return TinyRun(folder, tiny_model, prompts=prompts(folder)).train_here()


@pytest.fixture(scope="module")
def shared(tiny_model: Path, wanted: dict[str, Any]) -> Iterator[Cluster]:
    """A cluster with two nodes for all tests: those that end one start it again."""
    with ExitStack() as held:
        name = held.enter_context(tempfile.TemporaryDirectory(prefix="pr-", dir="/tmp"))
        made = Cluster(Path(name), tiny_model, held)
        for host in NODES[:2]:
            made.start(host)
        yield made


@pytest.fixture
def cluster(shared: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """With a run of the test's own."""
    shared.fresh()
    began, failed = time.monotonic(), request.session.testsfailed
    yield shared
    sys.stdout.write(shared.said())  # pytest shows it if the test failed
    passed = request.session.testsfailed == failed
    seconds = round(time.monotonic() - began)
    KILLS[request.node.name] = {"passed": passed, "seconds": seconds, "struck": shared.struck}
    if RECORD:
        Path(RECORD).write_text(json.dumps({**about(), "tests": KILLS}, indent=1) + "\n")


def about() -> dict[str, Any]:
    names = ("paceline", "ray", "torch")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in names},
        "samples": NUM_SAMPLES,
        "processors": os.cpu_count(),
        "load_at_the_end": os.getloadavg()[0],
    }


def finish(cluster: Cluster, driver: subprocess.Popen[str], wanted: dict[str, Any]) -> None:
    """The command ends well, and the weights are the bits of one host."""
    assert driver.wait(timeout=WAIT_S) == 0, cluster.said()
    assert same_bits(cluster.weights(), wanted)
    assert not cluster.commands(), "nothing is left"


def begin(cluster: Cluster) -> tuple[subprocess.Popen[str], str]:
    """A run that has trained some samples; its command, and the trainer's host."""
    driver = cluster.paceline("train")
    wait_until(lambda: cluster.trained() > 0, "a trained sample", driver)
    host = cluster.host_of("consumer")
    assert host is not None
    return driver, host


def test_a_raylet_is_killed(cluster: Cluster, wanted: dict[str, Any]) -> None:
    """The one under the trainer, which goes on on another node, and does not train twice."""
    driver, host = begin(cluster)
    cluster.kill_raylet(host)
    finish(cluster, driver, wanted)
    [before, after] = re.findall(r"the trainer is on (\S+)", cluster.said())
    assert (before, after != host) == (host, True)


def test_a_host_is_killed(cluster: Cluster, wanted: dict[str, Any]) -> None:
    """Every process on it at one moment, as a power failure does."""
    driver, host = begin(cluster)
    cluster.kill_host(host)
    finish(cluster, driver, wanted)


def test_a_producers_process_and_its_raylet_are_killed(cluster: Cluster, wanted: dict[str, Any]) -> None:
    """The trainer's own producer goes on alone meanwhile."""
    driver = cluster.paceline("train")
    wait_until(lambda: "producer 1 is on" in cluster.said(), "a producer apart", driver)
    host = re.findall(r"producer 1 is on (\S+)", cluster.said())[-1]
    cluster.kill(host, "produce")
    wait_until(lambda: "is started again" in cluster.said() or cluster.trained() > 50, "an answer", driver)
    cluster.kill_raylet(host)
    finish(cluster, driver, wanted)


def test_the_clusters_head_is_killed(cluster: Cluster, wanted: dict[str, Any]) -> None:
    """Then the cluster ends, with all that it has started; in a new one the same command goes on."""
    driver, _ = begin(cluster)
    cluster.kill_host(HEAD, but=[driver.pid, *below(driver.pid)])
    assert driver.wait(timeout=WAIT_S) == 1
    assert "The connection to the Ray cluster" in cluster.said()
    wait_until(lambda: not cluster.commands(), "the end of all commands")
    cluster.start_anew()
    finish(cluster, cluster.paceline("train"), wanted)


def test_the_command_is_killed_and_finds_its_run_again(cluster: Cluster, wanted: dict[str, Any]) -> None:
    driver, _ = begin(cluster)
    driver.kill()
    driver.wait()
    cluster.struck.append("the command")
    again = cluster.paceline("train")
    finish(cluster, again, wanted)
    assert "is going on in this cluster already" in cluster.said()


def test_ctrl_c_stops_at_a_checkpoint_and_the_same_command_goes_on(
    cluster: Cluster, wanted: dict[str, Any]
) -> None:
    driver, _ = begin(cluster)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=WAIT_S) == 130, cluster.said()
    assert not cluster.commands()
    now = cluster.now()
    assert now is not None
    assert now.usage.provisional_samples == 0, "a checkpoint covers what was trained"
    finish(cluster, cluster.paceline("train"), wanted)


def test_a_stop_from_elsewhere(cluster: Cluster, wanted: dict[str, Any]) -> None:
    driver, _ = begin(cluster)
    stop = cluster.paceline("stop")
    assert stop.wait(timeout=WAIT_S) == 0, cluster.said()
    driver.wait(timeout=WAIT_S)
    assert not cluster.commands()
    finish(cluster, cluster.paceline("train"), wanted)
    assert cluster.paceline("stop").wait(timeout=WAIT_S) == 0
    assert "No process of the run is in this cluster" in cluster.said()


def test_a_run_that_is_refused_is_not_started_again(cluster: Cluster) -> None:
    """The command ends with the run's own advice and its exit code."""
    driver, _ = begin(cluster)
    driver.send_signal(signal.SIGINT)
    driver.wait(timeout=WAIT_S)
    cluster.run.config["run"]["seed"] = 7
    cluster.run.write()
    assert cluster.paceline("train").wait(timeout=WAIT_S) == 2
    assert "was started with other settings" in cluster.said()
    assert "it is started again" not in cluster.said()
    assert not cluster.commands()


def test_stores_of_one_host_are_refused(cluster: Cluster) -> None:
    cluster.run.config["features"] = {"budget_mib": 8}
    cluster.run.write()
    assert cluster.paceline("train").wait(timeout=WAIT_S) == 2
    assert "only one host reaches features: {store: shm}" in cluster.said()
    assert not cluster.run.directory.exists()


def test_a_client_outside_the_cluster(cluster: Cluster, wanted: dict[str, Any]) -> None:
    """It reaches the head's port for clients, and no node."""
    host = cluster.network.hosts[HEAD].address
    finish(cluster, cluster.paceline("train", address=f"ray://{host}:10001"), wanted)


def test_a_cluster_of_the_commands_own(cluster: Cluster, wanted: dict[str, Any]) -> None:
    """With the stores of one host; nothing of it is left."""
    cluster.run.config["features"], cluster.run.config["ledger"] = {"budget_mib": 8}, {"store": "sqlite"}
    cluster.run.config["machine"] = {}
    cluster.run.write()
    driver = cluster.paceline("train", address="local", host=NODES[2])
    assert driver.wait(timeout=WAIT_S) == 0, cluster.said()
    assert same_bits(cluster.run.final_weights(), wanted)
    wait_until(lambda: not cluster.processes_on(NODES[2]), "the end of the local cluster")


def test_a_cluster_without_a_token_is_refused(cluster: Cluster) -> None:
    """Whoever reaches its ports could run programs on it."""
    address = cluster.network.hosts[NODES[2]].address
    cluster.start(NODES[2], "--head", "--port=6379", "--num-cpus=3", "--include-dashboard=false", token=False)
    driver = cluster.paceline("train", address=f"{address}:6379", host=NODES[2], token=False)
    assert driver.wait(timeout=WAIT_S) == 2
    assert "takes calls without a token" in cluster.said()
    cluster.kill_host(NODES[2])


POINTS = (
    "checkpoint.after_file",
    "checkpoint.before_sync",
    "checkpoint.after_set_aside",
    "features.put.before_seal",
)


@pytest.mark.parametrize("point", POINTS)
def test_a_raylet_is_killed_at_a_named_point(cluster: Cluster, wanted: dict[str, Any], point: str) -> None:
    """By the role that reaches it, which then goes on: it is an orphan in the middle of a file."""
    (cluster.folder / "points").mkdir(exist_ok=True)
    (cluster.folder / "points" / "now").write_text(point)
    driver = cluster.paceline("train")
    finish(cluster, driver, wanted)
    assert not (cluster.folder / "points" / "now").exists(), "the point was reached"
    cluster.struck.append(f"a raylet at {point}")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_kills_at_random_times(cluster: Cluster, wanted: dict[str, Any], seed: int) -> None:
    """Of roles, of what keeps them going, of raylets, hosts and the command."""
    rng = random.Random(seed)
    driver = cluster.paceline("train")
    for _ in range(KILLS_A_RUN):
        end = time.monotonic() + rng.uniform(0.5, 12.0)
        while time.monotonic() < end and driver.poll() is None:
            time.sleep(0.05)
        driver = cluster.strike(rng, driver)
        for host in NODES[:2]:
            if cluster.raylet(host) is None:
                cluster.start(host)
    finish(cluster, driver if driver.poll() is None else cluster.paceline("train"), wanted)
