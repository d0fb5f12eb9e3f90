"""Proves on a real Slurm that jobs which are killed and queued again end in the same weights.

    PYTHONPATH=. python tests/slurm/check_slurm.py [--record FILE]

Needs root, and Debian's slurmctld, slurmd, slurm-client and munge. The cluster is one host in namespaces of
its own: nothing of it is seen outside, and everything ends with it. A run is trained without any Slurm; then
again as `paceline launch slurm --submit` starts it, with a ledger in a file, while its job is signalled as
before a time limit, killed, and queued again; then with a ledger on a server and producers that join, killed,
too. Exits with 1 if weights differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import commit
from paceline.durable_files import replace_file
from paceline.monitoring.status import read_status
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun
from paceline.testing.valkey_server import ValkeyServer

INSIDE = "PACELINE_CHECK_SLURM"
ADDRESS = "10.77.0.1"  # of the namespace's own loopback device: no address of one host alone
LOOK_S, PATIENCE_S = 0.2, 300.0
SHAPE: dict[str, dict[str, Any]] = {
    "prompts": {"rounds": 6},
    "features": {"budget_mib": 32},
    "training": {"passes": 4, "batch_size": 4, "micro_batch_size": 2},
    "checkpoint": {"interval_steps": 10},
}
CONFIGURATION = """
ClusterName=paceline
SlurmctldHost={host}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,defer=0
KillWait=2
MinJobAge=3600
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr={address} CPUs=8 RealMemory=65536 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Cluster:
    """Slurm on this host, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        host = os.uname().nodename
        configuration = folder / "slurm.conf"
        configuration.write_text(CONFIGURATION.format(host=host, address=ADDRESS, folder=folder))
        os.environ["SLURM_CONF"] = str(configuration)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        names = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
        names |= {"log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}
        options = [f"--{name}={path}" for name, path in names.items()]
        self._processes = [
            self._begin("munged", "--foreground", "--force", *options),
            self._begin("slurmctld", "-D", "-c"),
            self._begin("slurmd", "-D", "-c"),
        ]
        wait_until(lambda: "idle" in self.told("sinfo", "--noheader", "--format=%T"), "an idle node")

    def _begin(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            return subprocess.Popen(command, stdout=out, stderr=out)

    def told(self, *command: str) -> str:
        return subprocess.run(command, text=True, capture_output=True, check=False).stdout

    def state(self, job: str) -> str:
        return self.told("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def restarts(self, job: str) -> int:
        fields = self.told("scontrol", "show", "job", job, "--oneliner").split()
        return sum(int(field.partition("=")[2]) for field in fields if field.startswith("Restarts="))

    def end(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(timeout=30)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited in vain for {what}")
        time.sleep(LOOK_S)


def step_of(run: TinyRun) -> int:
    """Of the newest checkpoint."""
    try:
        return read_status(run.directory).checkpoint.step or 0
    except Exception:  # noqa: BLE001 (there is none yet)
        return 0


def launched(run: TinyRun, *options: str) -> list[str]:
    """The numbers of the jobs."""
    verb = [sys.executable, "-m", "paceline", "launch", "slurm", str(run.run_file), "--submit"]
    command = [*verb, "--time", "1:00:00", "--memory-gib", "1", *options]
    told = subprocess.run(command, cwd=run.folder, text=True, capture_output=True, check=False)
    if told.returncode:
        raise SystemExit(told.stderr)
    return [line.split()[1] for line in told.stdout.splitlines()]


def requeued(cluster: Cluster, job: str, times: int) -> None:
    wait_until(lambda: cluster.restarts(job) >= times and cluster.state(job) == "RUNNING", "the job again")


def ended(cluster: Cluster, job: str, run: TinyRun) -> None:
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING", ""), "the job's end")
    if cluster.state(job) != "COMPLETED":
        raise SystemExit(f"job {job}: {cluster.state(job)}\n{outputs(run)}")


def outputs(run: TinyRun) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(run.folder.glob("slurm-*.out")))


def on_one_host(cluster: Cluster, run: TinyRun) -> dict[str, Any]:
    """Signalled as before its time limit, then killed with everything that it started, then let end."""
    [job] = launched(run)
    wait_until(lambda: step_of(run) >= 20, "a checkpoint")
    cluster.told("scancel", "--batch", "--signal=USR1", job)
    requeued(cluster, job, 1)
    first = step_of(run)
    wait_until(lambda: step_of(run) >= first + 10, "a later checkpoint")
    cluster.told("scontrol", "requeue", job)
    requeued(cluster, job, 2)
    second = step_of(run)
    ended(cluster, job, run)
    return {"stopped at step": first, "killed after step": second, "restarts": cluster.restarts(job)}


def with_producers(cluster: Cluster, run: TinyRun) -> dict[str, Any]:
    """Two that join; one of them is killed and queued again, and so is the trainer."""
    trainer, producers = launched(run, "--producers", "2")
    wait_until(lambda: cluster.state(f"{producers}_1") == "RUNNING", "a producer")
    wait_until(lambda: step_of(run) >= 20, "a checkpoint")
    cluster.told("scontrol", "requeue", f"{producers}_1")
    cluster.told("scontrol", "requeue", trainer)
    requeued(cluster, trainer, 1)
    second = step_of(run)
    for job in (trainer, f"{producers}_1", f"{producers}_2"):
        ended(cluster, job, run)
    joined = outputs(run).count("role_started")
    return {"killed after step": second, "restarts": cluster.restarts(trainer), "producers joined": joined}


def differences(run: TinyRun, expected: dict[str, torch.Tensor]) -> list[str]:
    found = run.final_weights()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def check(folder: Path) -> dict[str, Any]:
    model = make_tiny_folder(folder / "target")
    alone = TinyRun(folder / "alone", model, **SHAPE)
    done = alone.command("train")
    if done.returncode:
        raise SystemExit(done.stderr)
    expected = alone.final_weights()
    (folder / "slurm").mkdir()
    cluster = Cluster(folder / "slurm")
    (folder / "server").mkdir()
    told: dict[str, Any] = {}
    version = cluster.told("sbatch", "--version").strip()
    try:
        run = TinyRun(folder / "it's a run", model, **SHAPE)
        told["one host, ledger in a file"] = on_one_host(cluster, run)
        told["one host, ledger in a file"]["tensors that differ"] = differences(run, expected)
        print(json.dumps(told), flush=True)
        server = {"port": "6379", "bind": ADDRESS, "protected-mode": "no"}
        with ValkeyServer(folder / "server", **server):
            shared = {"store": "directory", "directory": str(folder / "features"), "budget_mib": 32}
            ledger = {"store": "redis", "url": f"redis://{ADDRESS}:6379/0"}
            (folder / "features").mkdir()
            run = TinyRun(folder / "joined", model, **{**SHAPE, "features": shared, "ledger": ledger})
            name = "ledger on a server, two producers join"
            told[name] = with_producers(cluster, run)
            told[name]["tensors that differ"] = differences(run, expected)
    finally:
        cluster.end()
    return {"slurm": version, "runs": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="Write what was found to this file.")
    options = parser.parse_args()
    if INSIDE not in os.environ:
        for program in ("munged", "slurmctld", "slurmd", "sbatch", "unshare"):
            if shutil.which(program) is None:
                raise SystemExit(f"{program} is missing: apt-get install slurmctld slurmd slurm-client munge")
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.environ[INSIDE] = "yes"
        os.execvp(command[0], [*command, sys.executable, *sys.argv])  # noqa: S606 (this script)
    for arguments in (["link", "set", "lo", "up"], ["addr", "add", f"{ADDRESS}/32", "dev", "lo"]):
        subprocess.run(["ip", *arguments], check=True)  # noqa: S607
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="paceline-slurm-") as place:
        told = check(Path(place))
    report = {"date": str(date.today()), "commit": commit(), **told}
    report["seconds"] = round(time.monotonic() - began)
    print(json.dumps(report, indent=1))
    if options.record:
        replace_file(options.record, (json.dumps(report, indent=1) + "\n").encode())
    sys.exit(any(run["tensors that differ"] for run in told["runs"].values()))


if __name__ == "__main__":
    main()
