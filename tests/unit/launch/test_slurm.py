"""The batch script: what it types, what it does when its time is nearly over, and that no text escapes it.

The script runs in a real bash, with programs beside it that note how they are called.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from run_of_hosts import ALONE, SHELLCHECK, Write

from paceline.cli.main import app
from paceline.errors import ConfigError, PacelineError
from paceline.launch import slurm
from paceline.launch.fleet import Fleet

# Each notes its arguments. `paceline train` and a producer work until they are stopped, if they are to.
FAKE = r"""#!/bin/bash
printf '%s\n' "$(basename "$0") $*" >>"$NOTED"
case "$(basename "$0") $*" in
  *" --json") printf '{\n "state": "complete"\n}\n' ;;
  "paceline train"* | "paceline produce"*)
    cat "$2" >"$NOTED.run"
    if [ "$WORKS" = yes ] || [ "$WORKS" = "$1" ]; then
      trap '[ -n "$STUBBORN" ] && STUBBORN= || exit 0' TERM
      echo $$ >"$NOTED.pid"
      echo begun
      while :; do read -r -t 1 <>"$NOTED.fifo"; done
    fi
    read -r code <"$NOTED.codes" && sed -i 1d "$NOTED.codes" && exit "$code"
    ;;
  torchrun*)
    if [ -n "$RANKS_WAIT" ]; then
      trap 'exit 0' TERM
      echo $$ >"$NOTED.pid"
      while :; do read -r -t 1 <>"$NOTED.fifo"; done
    fi
    read -r code <"$NOTED.rank-codes" && sed -i 1d "$NOTED.rank-codes" && exit "$code"
    ;;
  "paceline stop"*) kill "$(cat "$NOTED.pid")" ;;
  srun*) while [ "$1" != bash ]; do shift; done; exec "$@" ;;
  sbatch*) cat >"$NOTED.script"; echo "7$(wc -l <"$NOTED");cluster" ;;
esac
exit 0
"""


class Cluster:
    """A folder of such programs, and what was noted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin, self.noted = folder / "bin", folder / "noted"
        self.bin.mkdir()
        for name in ("paceline", "scontrol", "srun", "torchrun", "sbatch"):
            program = self.bin / name
            program.write_text(FAKE)
            program.chmod(0o755)
        os.mkfifo(f"{self.noted}.fifo")
        self.ends_with()
        self.ranks_end_with()
        monkeypatch.setattr(sys, "executable", str(self.bin / "python"))
        monkeypatch.setattr(slurm, "PAUSE_S", 0)
        self.environment = {
            "PATH": os.environ["PATH"],
            "NOTED": str(self.noted),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_PER_TASK": "2",
            "SLURM_NODEID": "0",
        }

    def ends_with(self, *codes: int) -> None:
        """The exit codes of the next ones of `paceline train` and `produce`; then 0."""
        Path(f"{self.noted}.codes").write_text("".join(f"{code}\n" for code in codes))

    def ranks_end_with(self, *codes: int) -> None:
        Path(f"{self.noted}.rank-codes").write_text("".join(f"{code}\n" for code in codes))

    def begin(self, text: str, **environment: str) -> subprocess.Popen[str]:
        script = self.noted.with_suffix(".sbatch")
        script.write_text(text)
        return subprocess.Popen(
            ["/bin/bash", str(script)],
            env=self.environment | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, text: str, **environment: str) -> int:
        with self.begin(text, **environment) as job:
            _, told = job.communicate(timeout=60)
        assert not told, told
        return job.returncode

    @property
    def calls(self) -> list[str]:
        return self.noted.read_text().splitlines()

    @property
    def run_file(self) -> str:
        return Path(f"{self.noted}.run").read_text()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def script(run_file: Path, setup: Path | None = None, **given: Any) -> str:
    return slurm.script(Fleet.of(run_file, **given), time="1:00:00", setup=setup)


def directives(text: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)


def test_one_job_trains_everything_on_one_host(write: Write, cluster: Cluster) -> None:
    run_file = write(**ALONE)
    text = script(run_file)
    assert {"--job-name=my-run", "--nodes=1", "--gpus-per-node=2", "--requeue"} <= set(directives(text))
    assert "--signal=B:USR1@300" in directives(text)
    assert cluster.run(text) == 0
    assert cluster.calls == [f"paceline train {run_file}"]


def test_the_code_of_a_failure_is_the_jobs_and_it_is_not_queued_again(write: Write, cluster: Cluster) -> None:
    cluster.ends_with(7)
    assert cluster.run(script(write(**ALONE))) == 7
    assert not any(call.startswith("scontrol") for call in cluster.calls)


def signalled(cluster: Cluster, text: str, works: str = "yes", **environment: str) -> None:
    """USR1 while the work is going on."""
    with cluster.begin(text, WORKS=works, **environment) as job:
        assert job.stdout
        assert job.stdout.readline() == "begun\n"
        job.send_signal(signal.SIGUSR1)
        _, told = job.communicate(timeout=60)
    assert not told, told


def test_before_its_time_is_over_training_is_stopped_and_queued_again(write: Write, cluster: Cluster) -> None:
    """By `paceline stop`, which waits for the checkpoint."""
    run_file = write(**ALONE)
    signalled(cluster, script(run_file))
    assert cluster.calls == [f"paceline train {run_file}", f"paceline stop {run_file}", "scontrol requeue 42"]


def test_what_comes_to_no_safe_point_is_ended_in_time(
    write: Write, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second signal ends it; else Slurm would end the job, and not queue it again."""
    monkeypatch.setattr(slurm, "LATE_S", 1)
    signalled(cluster, script(write(), producers=2), SLURM_ARRAY_TASK_ID="1", STUBBORN="yes")
    assert cluster.calls[-1] == "scontrol requeue 42"


def test_a_job_of_the_array_joins_with_a_folder_of_its_own(write: Write, cluster: Cluster) -> None:
    """Until the run has begun it tries again; its folder goes with it."""
    cluster.ends_with(2, 5)
    assert cluster.run(script(write(), producers=2), SLURM_ARRAY_TASK_ID="1") == 0
    [*_, last] = cluster.calls
    assert len(cluster.calls) == 3
    found = re.fullmatch(r"paceline produce (/tmp/paceline\.\w+)/run.yaml --join", last)
    assert found
    assert not Path(found[1]).exists()
    assert f'directory: "{found[1]}/run"' in cluster.run_file
    assert "device: cuda:0" in cluster.run_file


def test_a_producer_that_never_comes_to_work_gives_up(write: Write, cluster: Cluster) -> None:
    cluster.ends_with(*[2] * 30)
    assert cluster.run(script(write(), producers=2), SLURM_ARRAY_TASK_ID="1") == 2
    assert len(cluster.calls) == 20


def test_before_its_time_is_over_a_producer_leaves_and_is_queued(write: Write, cluster: Cluster) -> None:
    signalled(cluster, script(write(), producers=2), SLURM_ARRAY_TASK_ID="1")
    assert [call.split()[0] for call in cluster.calls] == ["paceline", "scontrol"]


@pytest.mark.parametrize("node", ["0", "1"])
def test_ranks_of_several_hosts_meet_and_the_first_one_measures(
    write: Write, cluster: Cluster, node: str
) -> None:
    """Each host but the first has a run's folder of its own."""
    run_file = write(machine={"trainers": 4})
    text = script(run_file, hosts=2, gpus=4)
    assert cluster.run(text, SLURM_JOB_NUM_NODES="2", SLURM_NODEID=node) == 0
    assert f"paceline produce {run_file}" in cluster.calls
    [torchrun] = [call for call in cluster.calls if call.startswith("torchrun")]
    assert f"--nnodes 2 --node-rank {node} --nproc-per-node 4" in torchrun
    assert "--rdzv" not in torchrun, "it would give rank 0 to the host whose name is the first"
    assert torchrun.endswith(f"consume {run_file}") is (node == "0")
    assert cluster.calls[-1] == f"paceline train {run_file}"


def test_ranks_that_lose_one_of_them_are_started_again(write: Write, cluster: Cluster) -> None:
    cluster.ranks_end_with(1, 1)
    assert cluster.run(script(write(), hosts=2), SLURM_JOB_NUM_NODES="2") == 0
    assert sum(call.startswith("torchrun") for call in cluster.calls) == 3


@pytest.mark.parametrize(("codes", "starts"), [((3,), 1), ((137, 3), 2)])
def test_ranks_do_not_wait_for_a_producer_that_has_failed(
    write: Write, cluster: Cluster, codes: tuple[int, ...], starts: int
) -> None:
    """One that was killed is started again; an error of its own is the job's."""
    cluster.ends_with(*codes)
    text = script(write(), hosts=2)
    assert cluster.run(text, SLURM_JOB_NUM_NODES="2", RANKS_WAIT="yes") == 3
    assert sum(call.startswith("torchrun") for call in cluster.calls) == starts
    assert not any(call.startswith("scontrol") for call in cluster.calls)


def test_a_measurement_after_ranks_is_stopped_in_time_too(write: Write, cluster: Cluster) -> None:
    signalled(cluster, script(write(), hosts=2), "train", SLURM_JOB_NUM_NODES="2")
    assert cluster.calls[-1] == "scontrol requeue 42"


def test_no_text_of_the_users_escapes_the_script(
    write: Write, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of folders with quotes, newlines, foreign letters and what a terminal obeys."""
    folder = tmp_path / "it's $(touch bad)\n#SBATCH --nodes=9\n`ß\u202e\x1b[2J"
    run_file = write(folder, **ALONE)
    setup = folder / "set up.sh"
    setup.write_text('export NOTED="$NOTED"; touch "$NOTED.set-up"\n')
    monkeypatch.chdir(folder)
    text = script(run_file, setup)
    assert text.isascii()
    assert len(directives(text)) == len(directives(script(write(tmp_path / "plain", **ALONE))))
    assert cluster.run(text) == 0
    assert cluster.noted.read_text() == f"paceline train {run_file}\n"
    assert Path(f"{cluster.noted}.set-up").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml", "set up.sh"]


@pytest.mark.parametrize(
    "given", [{"options": ["--a\n#SBATCH --b"]}, {"options": ["rm"]}, {"time": "a\nb"}, {"time": "1:2:3:4"}]
)
def test_an_option_that_is_none_is_refused(write: Write, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        slurm.script(Fleet.of(write()), **{"time": "1:00:00", **given})


@pytest.mark.parametrize(
    ("time", "fits"), [("5", 0), ("9:59", 0), ("0:9:0", 0), ("0-0:5", 0), ("0-1", 1), ("0", 1)]
)
def test_a_limit_that_leaves_no_time_for_work_is_refused(write: Write, time: str, fits: bool) -> None:
    """The job would be stopped at once, and queue itself again for ever."""
    with nullcontext() if fits else pytest.raises(ConfigError, match="next to nothing"):
        slurm.script(Fleet.of(write()), time=time)


@pytest.mark.parametrize("given", [{}, {"producers": 3}, {"hosts": 4, "producers": 64, "gpus": 8}])
def test_the_script_passes_shellcheck(write: Write, tmp_path: Path, given: dict[str, Any]) -> None:
    path = tmp_path / "script.sbatch"
    path.write_text(script(write(), **given))
    for command in (["bash", "-n", str(path)], [str(SHELLCHECK), str(path)]):
        found = subprocess.run(command, text=True, capture_output=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr


def test_the_verb_queues_the_trainer_and_then_its_producers(
    write: Write, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**cluster.environment, "PATH": f"{cluster.bin}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    run_file = write(engine={"name": "transformers", "device": "cpu"})
    app(["launch", "slurm", str(run_file), "--producers", "8", "--submit"], standalone_mode=False)
    first, second = cluster.calls
    assert first == "sbatch --parsable"
    assert second.startswith("sbatch --parsable --nodes=1 --array=1-8 --cpus-per-task=1 --mem=")
    assert second.endswith("--gpus-per-node=0 --dependency=after:71")
    assert Path(f"{cluster.noted}.script").read_text().startswith("#!/bin/bash\n")
    assert "job 72 captures" in capsys.readouterr().out


def test_a_host_without_slurm_is_told(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fleet = Fleet.of(write())
    with pytest.raises(ConfigError, match="There is no sbatch"):
        slurm.submit(fleet, "")
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(PacelineError, match="invalid partition"):
        slurm.submit(fleet, "")
