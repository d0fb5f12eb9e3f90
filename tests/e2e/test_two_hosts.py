"""The walk-through of several hosts in docs/operations.md, as it stands there, on hosts with a shared folder.

A host is namespaces of this machine: network, name, mounts and /dev/shm are its own. What the hosts share is
a folder, which each mounts where the document says, and the ledger's server, which is a third host.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from paceline.ledger.locks import live_holder
from paceline.ledger.records import Snapshot
from paceline.ledger.stores.redis import RedisView
from paceline.telemetry import read_events
from paceline.testing.network import Network, NoNetworkError, address_of
from paceline.testing.small_run import same_bits
from paceline.testing.tiny_run import TinyRun, wait_until
from paceline.testing.valkey_server import ValkeyServer

DOCUMENT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
SECTION = re.sub(
    "^   ", "", DOCUMENT.partition("\n## Several hosts\n")[2].partition("\n## ")[0], flags=re.MULTILINE
)
SERVER, *WORKERS = HOSTS = ("ledgers", "gpu-a", "gpu-b")
NUM_SAMPLES = 60


def told_run_file() -> dict[str, Any]:
    [text] = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    return yaml.safe_load(text)


def commands_on(host: str) -> list[str]:
    """What the walk-through has typed on this host, a block each."""
    return re.findall(rf"```bash\n# on {host}\b.*?\n(.*?)```", SECTION, re.DOTALL)


class Hosts:
    """The three hosts, and the folders that are their disks."""

    def __init__(self, folder: Path, model: Path) -> None:
        """Raises NoNetworkError."""
        self.folder, self.shared = folder, folder / "shared"
        self.shared.mkdir()
        shutil.copytree(model, folder / "model")
        names = "".join(f"{address_of(n)} {name}\n" for n, name in enumerate(HOSTS))
        (folder / "names").write_text(f"127.0.0.1 localhost\n{names}")
        self.runs = {name: self._disk(folder / name) for name in WORKERS}
        place = told_run_file()["features"]["directory"]
        mounts = {place: self.shared, "/etc/hosts": folder / "names"}
        self.network = Network(HOSTS, mounts=dict.fromkeys(WORKERS, mounts))
        (folder / SERVER).mkdir()
        rules = re.findall(r"^user paceline on .*$", DOCUMENT, re.MULTILINE)
        (folder / SERVER / "users.acl").write_text(f"user default on nopass ~* &* +@all\n{rules[0]}\n")
        host = self.network.hosts[SERVER]
        acl = str(folder / SERVER / "users.acl")
        self.server = ValkeyServer(
            folder / SERVER, host.enter, port="6379", bind=host.address, protected_mode="no", aclfile=acl
        )

    def _disk(self, folder: Path) -> TinyRun:
        """A host's disk, with the document's run file and what each host needs beside it."""
        run = make_run(folder, self.folder / "model")
        run.config |= told_run_file()
        run.run_file = folder / f"{run.config['run']['name']}.yaml"
        run.write()
        run.directory = folder / run.config["run"]["directory"]
        (folder / "bin").mkdir()
        program = folder / "bin" / "paceline"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m paceline.cli.main "$@"\n')
        program.chmod(0o755)
        return run

    def start(self, host: str, script: str) -> subprocess.Popen[str]:
        """Type these lines into a shell of that host."""
        folder, enter = self.folder / host, self.network.hosts[host].enter
        arguments = ["bash", "-ec", f"cd {folder}\n{textwrap.dedent(script)}"]
        paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "COLUMNS": "200"}
        environment = {**os.environ, **paths, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(arguments, env=environment, preexec_fn=enter, start_new_session=True, **pipes)

    def run(self, host: str, script: str) -> str:
        process = self.start(host, script)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, out + err
        return out

    def captured(self, host: str) -> int:
        """How many groups the producers of this host have committed."""
        files = (self.runs[host].directory / "events").glob("producer*.jsonl")
        return sum(event["event"] == "group" for path in files for event in read_events(path))

    def now(self) -> Snapshot:
        view = RedisView(self.server.url, told_run_file()["run"]["name"], patience_s=10.0)
        try:
            return view.snapshot()
        finally:
            view.close()

    def close(self) -> None:
        self.server.stop()
        self.network.close()


@pytest.fixture
def hosts(tiny_model: Path) -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="paceline-hosts-", dir="/tmp") as name:  # hosts hide /dev/shm
        try:
            made = Hosts(Path(name), tiny_model)
        except NoNetworkError as refused:
            pytest.skip(f"this machine makes no namespaces for this user: {refused}")
        yield made
        made.close()


def make_run(folder: Path, model: Path) -> TinyRun:
    prompts = {"path": str(folder / "train.jsonl"), "rounds": NUM_SAMPLES // 20, "max_answer_tokens": 12}
    return TinyRun(folder, model, prompts=prompts, machine={"producer_timeout_s": 8})


@pytest.mark.timeout(900)  # five starts of Python with torch, on a machine that may be busy
def test_the_walk_through_ends_in_the_weights_of_a_run_on_one_host(
    hosts: Hosts, tiny_model: Path, tmp_path: Path
) -> None:
    """The trainer's own producer is held up until the other host's has captured, which is then killed.

    Nothing of the run lies in the memory of any host.
    """
    wanted = make_run(tmp_path, tiny_model).train_here()
    [train], [join, status] = commands_on("gpu-a"), commands_on("gpu-b")
    folder = hosts.runs["gpu-a"].directory
    trainer = hosts.start("gpu-a", train)
    with killed_at_the_end(trainer):
        wait_until(lambda: hosts.captured("gpu-a") > 0, trainer)
        held_up = live_holder(folder, "producer")
        assert held_up
        os.kill(held_up, signal.SIGSTOP)
        with killed_at_the_end(joined := hosts.start("gpu-b", join)):
            wait_until(lambda: hosts.captured("gpu-b") > 0, joined)
        assert "which hosts share" in hosts.run("gpu-b", status)
        os.kill(held_up, signal.SIGCONT)
        out, err = trainer.communicate(timeout=600)
    assert trainer.returncode == 0, out + err
    assert f"{NUM_SAMPLES} samples trained" in out
    now = hosts.now()
    assert now.head is not None
    assert same_bits(load_file(folder / "checkpoints" / now.head.name / "draft.safetensors"), wanted)
    assert now.committed == now.samples_trained == NUM_SAMPLES
    [left] = hosts.shared.iterdir()
    assert left.name == (folder / "answers").readlink().name
    assert len(list(left.glob("*.answers"))) >= 2, "the kept answers of both hosts"
    for host in WORKERS:
        assert hosts.run(host, "ls /dev/shm") == ""


@contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
