"""Runs on a real Ray cluster of several hosts: `make test-ray` runs it; the fast suite does not.

The hosts are of this machine (ray_hosts.py). Every run ends in the weights of the same run on one host, bit
for bit, whatever was killed.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from ray_hosts import HEAD, KINDS, NODES, NUM_SAMPLES, WAIT_S, Cluster, below, prompts, wait_until

from paceline.roles.trainers import role_of_rank
from paceline.testing.small_run import same_bits
from paceline.testing.tiny_run import TinyRun

SEEDS = int(os.environ.get("RAY_SEEDS", "3"))  # runs with kills at random times
RECORD = os.environ.get("RAY_RECORD")  # a JSON file that gets what was done
KILLS: dict[str, Any] = {}  # by test
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def wanted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights of the run on one host, which nothing disturbs."""
    folder = tmp_path_factory.mktemp("wanted")
    return TinyRun(folder, tiny_model, prompts=prompts(folder)).train_here()


@pytest.fixture(scope="module")
def wanted_of_two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same with two ranks, started by the command."""
    folder = tmp_path_factory.mktemp("wanted-of-two")
    run = TinyRun(folder, tiny_model, prompts=prompts(folder), machine={"trainers": 2})
    done = run.command("train")
    assert done.returncode == 0, done.stderr
    return run.final_weights()


@pytest.fixture(scope="module")
def shared(tiny_model: Path) -> Iterator[Cluster]:
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
    load = round(os.getloadavg()[0], 1)
    KILLS[request.node.name] = {"passed": passed, "seconds": seconds, "load": load, "struck": shared.struck}
    if RECORD:
        write_record(Path(RECORD))


def write_record(path: Path) -> None:
    """Of the tests of this session; what others of the day have recorded stays."""
    names = ("paceline", "ray", "torch")
    before = json.loads(path.read_text())["tests"] if path.exists() else {}
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in names},
        "samples": NUM_SAMPLES,
        "processors": os.cpu_count(),
        "tests": {**before, **KILLS},
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


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
    cluster.kill("produce")
    wait_until(lambda: "is started again" in cluster.said() or cluster.trained() > 50, "an answer", driver)
    cluster.kill_raylet(host)
    finish(cluster, driver, wanted)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(cluster: Cluster, wanted_of_two: dict[str, Any], rank: int) -> None:
    """Of two that Ray has placed together; the other one ends, too, and both are started again there."""
    cluster.set(machine={"trainers": 2})
    driver, host = begin(cluster)
    assert cluster.kill(role_of_rank(rank)) == f"{role_of_rank(rank)} on {host}"
    finish(cluster, driver, wanted_of_two)
    assert re.findall(r"the trainer is on (\S+)", cluster.said()) == [host]
    now = cluster.now()
    assert now is not None
    assert now.epochs["consumer"] == 2


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


def test_the_head_is_too_slow_to_start_a_clients_server(cluster: Cluster) -> None:
    """It gives up the first one, and the command asks for another."""
    address = f"ray://{cluster.network.hosts[HEAD].address}:10001"
    others = cluster.client_servers()  # of clients that have just gone
    stop = cluster.paceline("stop", address=address)
    wait_until(lambda: cluster.client_servers() - others, "a server for this client", stop)
    [first] = cluster.client_servers() - others
    os.kill(first, signal.SIGSTOP)
    cluster.struck.append("a client's server on head (stopped)")
    wait_until(lambda: cluster.client_servers() - others - {first}, "another server", stop)
    with suppress(ProcessLookupError):
        os.kill(first, signal.SIGKILL)
    assert stop.wait(timeout=WAIT_S) == 0, cluster.said()
    assert "No process of the run is in this cluster" in cluster.said()


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


def test_raylets_are_killed_at_named_points(cluster: Cluster, wanted: dict[str, Any]) -> None:
    """Each by the role that reaches it, which then goes on: it is an orphan in the middle of a file."""
    for point in POINTS:
        (cluster.armed / point).touch()
    driver = cluster.paceline("train")
    while driver.poll() is None:
        cluster.start_missing()
        time.sleep(0.5)
    finish(cluster, driver, wanted)
    assert not list(cluster.armed.iterdir()), "every point was reached"
    cluster.struck += [f"a raylet at {point}" for point in POINTS]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_kills_at_random_times(cluster: Cluster, wanted_of_two: dict[str, Any], seed: int) -> None:
    """In a run of two ranks: of a rank, a producer, a raylet, the command and the head, in any order."""
    cluster.set(machine={"trainers": 2})
    rng = random.Random(seed)
    driver = cluster.paceline("train")
    for kind in rng.sample(sorted(KINDS), len(KINDS)):
        if driver.poll():  # a node that dies while the command looks at it is told, and nothing is started
            driver = cluster.paceline("train")
        end = time.monotonic() + rng.uniform(0.5, 12.0)
        while time.monotonic() < end and driver.poll() is None:
            time.sleep(0.05)
        driver = cluster.strike(kind, rng, driver)
        cluster.start_missing()
    finish(cluster, driver if driver.poll() is None else cluster.paceline("train"), wanted_of_two)
