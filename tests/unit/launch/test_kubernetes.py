"""The manifests are what Kubernetes takes, hold no secret, and ask for no privilege."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import AuthenticationError, ConnectionError  # noqa: A004 (redis-py's name)
from redis.retry import Retry
from run_of_hosts import ALONE, SHELLCHECK, Write

from paceline.cli.main import app
from paceline.config.load import binding, load_run_config
from paceline.errors import ConfigError, FencedError, LedgerError, RanksError, RunBusyError, StoreError
from paceline.launch.fleet import Fleet
from paceline.launch.kubernetes import DATA as DATA_FOLDER
from paceline.launch.kubernetes import RESTARTS, SECRETS, manifests, text_of, volumes_of
from paceline.launch.pod_scripts import AGAIN, PRODUCER, RANK
from paceline.ledger.settings import RedisSection
from paceline.testing.valkey_server import BINARY

ROOT = Path(__file__).parents[3]
DATA = volumes_of(["data=/data"])
UNTIL_THERE = Retry(ConstantBackoff(0.05), 600, (ConnectionError, FileNotFoundError))
SECRET = "of-this-test"  # noqa: S105
VERSIONS = ("1.31", kubernetes_validate.latest_version())
FLEETS: list[dict[str, Any]] = [{}, {"hosts": 4, "producers": 64, "gpus": 8}]


def read(run_file: Path, **given: Any) -> list[dict[str, Any]]:
    """As kubectl reads what the command prints."""
    fleet = Fleet.of(run_file, **given)
    return list(yaml.safe_load_all(text_of(fleet, manifests(fleet, image="paceline:1", volumes=DATA))))


def by_name(found: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in found if one["kind"] == kind}


def pods(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one["spec"]["template"]["spec"] for one in found if "template" in one.get("spec", {})]


@pytest.mark.parametrize("given", FLEETS)
def test_every_manifest_is_valid(write: Write, given: dict[str, Any]) -> None:
    """By the schemas of the oldest version that they are for, and of the newest one."""
    found = read(write(), **given)
    assert found
    for one in found:
        for version in VERSIONS:
            kubernetes_validate.validate(one, version, strict=True)


def test_the_schemas_find_a_mistake(write: Write) -> None:
    one = by_name(read(write()), "Job")["my-run-train"]
    one["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, VERSIONS[0], strict=True)


@pytest.mark.parametrize("given", FLEETS)
def test_no_pod_has_a_privilege(write: Write, given: dict[str, Any]) -> None:
    for pod in pods(read(write(), **given)):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))


def test_shared_memory_holds_the_features_and_counts_as_memory(write: Write) -> None:
    """A container has 64 MiB of it by default."""
    [pod] = pods(read(write(**ALONE)))
    [shm] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shm == {"medium": "Memory", "sizeLimit": "5120Mi"}
    [container] = pod["containers"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert container["resources"]["limits"] == {"memory": f"{5120 + 16 * 1024}Mi", "nvidia.com/gpu": "2"}


def test_the_ledgers_server_wants_a_password_and_loses_nothing(write: Write) -> None:
    """The password is a secret of the user's; only pods of this run reach the server."""
    found = read(write(), producers=2)
    [server] = by_name(found, "StatefulSet").values()
    [container] = server["spec"]["template"]["spec"]["containers"]
    command = container["command"][-1]
    assert "requirepass" in command
    for setting in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction"):
        assert setting in command
    secret = {"secretKeyRef": {"name": "my-run-ledger", "key": "password"}}
    assert container["env"] == [{"name": "REDISCLI_AUTH", "valueFrom": secret}]
    policy = by_name(found, "NetworkPolicy")["my-run-ledger"]
    [ingress] = policy["spec"]["ingress"]
    [source] = ingress["from"]
    assert source["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "my-run"
    for job in by_name(found, "Job").values():
        [worker] = job["spec"]["template"]["spec"]["containers"]
        environment = {one["name"]: one for one in worker["env"]}
        assert environment["PACELINE_REDIS_URL"]["value"] == "redis://my-run-ledger:6379/0"
        assert environment["PACELINE_REDIS_PASSWORD"]["valueFrom"] == secret


def test_the_ledgers_server_starts_as_the_manifest_says(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one takes a ledger, with the password alone, and its command line does not show it."""
    [server] = by_name(read(write()), "StatefulSet").values()
    command = server["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    for here in (DATA_FOLDER, SECRETS):
        (tmp_path / here.lstrip("/")).mkdir(parents=True)
        command = command.replace(f"{here} ", f"{tmp_path}{here} ").replace(f"{here}/", f"{tmp_path}{here}/")
    socket = tmp_path / "socket"
    command = command.replace("valkey-server", str(BINARY)).replace(
        "--port 6379", f"--port 0 --unixsocket {socket}"
    )
    with subprocess.Popen(["/bin/sh", "-c", command], env={"REDISCLI_AUTH": SECRET}) as process:
        try:
            with Redis.from_url(f"unix://{socket}", password=SECRET, retry=UNTIL_THERE) as client:
                client.ping()
            assert SECRET.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
            with Redis.from_url(f"unix://{socket}") as client, pytest.raises(AuthenticationError):
                client.ping()
            monkeypatch.setenv("PACELINE_REDIS_PASSWORD", SECRET)
            RedisSection(url=f"unix://{socket}").open(tmp_path, "my-run").close()
        finally:
            process.terminate()


def test_a_server_that_the_run_file_names_is_used(write: Write) -> None:
    found = read(write(ledger={"store": "redis", "url": "redis://ledgers:6379/0"}), producers=2)
    assert not by_name(found, "StatefulSet")
    [container] = by_name(found, "Job")["my-run-train"]["spec"]["template"]["spec"]["containers"]
    assert [one["name"] for one in container["env"]] == ["HOME", "PACELINE_REDIS_PASSWORD"]


def test_the_run_files_of_the_pods_are_those_of_one_run(write: Write, tmp_path: Path) -> None:
    """Foreign text in them comes through whole."""
    data = {"path": "/data/ß\u202e 'x'\n- y", "max_answer_tokens": 64}
    run_file = write(data=data)
    [settings] = by_name(read(run_file, producers=2), "ConfigMap").values()
    read_back = []
    for name, text in settings["data"].items():
        path = tmp_path / name
        path.write_text(text)
        read_back.append(load_run_config(path))
    original = load_run_config(run_file)
    assert [binding(config) for config in read_back] == [binding(original)] * 2
    assert str(read_back[0].data.sources[0].path) == data["path"]
    assert [str(config.run.directory) for config in read_back] == ["/data/runs/my-run", "/tmp/paceline/run"]


def test_ranks_of_several_pods_meet_under_a_name(write: Write) -> None:
    found = read(write(machine={"trainers": 2}), hosts=3, gpus=2)
    job = by_name(found, "Job")["my-run-train"]["spec"]
    assert (job["completions"], job["parallelism"]) == (3, 3)
    assert job["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    pod = job["template"]["spec"]
    service = by_name(found, "Service")["my-run-train"]["spec"]
    assert pod["subdomain"] == "my-run-train"
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    policy = by_name(found, "NetworkPolicy")["my-run-train"]["spec"]
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": service["selector"]}}]}]
    assert service["selector"] == job["template"]["metadata"]["labels"]
    environment = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert environment["MEET"] == "my-run-train-0.my-run-train"
    assert (environment["HOSTS"], environment["RANKS"]) == ("3", "2")


def test_two_runs_of_one_namespace_have_names_of_their_own(write: Write) -> None:
    """Else the second one's run file would take the place of the first one's."""
    runs = ["my-run", "My-run", "my_run", "my.run"]
    jobs = [list(by_name(read(write(run={"name": name, "directory": "/data/x"})), "Job")) for name in runs]
    assert jobs[0] == ["my-run-train"]
    assert len({job for [job] in jobs}) == len(runs)


WAITS = "trap 'exit 0' TERM; while :; do read -rt 1; done"
# As torchrun: it begins one rank in a session of its own, tells it to stop, and ends with 1 if it failed.
TORCHRUN = """while [ "$1" != --no-python ]; do shift; done
shift
trap 'kill -TERM -- -$!' TERM
setsid "$@" &
wait "$!" || wait "$!" || exit 1"""


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a script of a pod, with programs of the test's own; all end with the test, as in a pod."""
    scripts: list[subprocess.Popen[bytes]] = []
    os.mkfifo(tmp_path / "fifo")

    def started(script: str, index: str = "0", **programs: str) -> subprocess.Popen[bytes]:
        for name, work in programs.items():
            program = tmp_path / name
            program.write_text(f"#!/bin/bash\nexec 0<>{tmp_path}/fifo\n{work}\n")
            program.chmod(0o755)
        told = {"JOB_COMPLETION_INDEX": index, "HOSTS": "2", "RANKS": "1", "MEET": "first", "PAUSE_S": "0"}
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {"PATH": path, "TMPDIR": str(tmp_path), "HERE": str(tmp_path), **told}
        command = ["/bin/bash", "-c", script]
        scripts.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return scripts[-1]

    yield started
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        with suppress(ProcessLookupError):
            if os.getsid(pid) in {script.pid for script in scripts}:
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("ends", "code"), [(2, 2), (8, 8), (1, AGAIN), (3, AGAIN), (6, AGAIN), (137, AGAIN)])
def test_ranks_do_not_wait_for_a_producer_that_has_failed(
    pod: Callable[..., Any], ends: int, code: int
) -> None:
    """What needs advice ends the Job; the rest is tried again."""
    assert pod(RANK, paceline=f"exit {ends}", torchrun=WAITS).wait(30) == code


@pytest.mark.parametrize("index", ["0", "1"])
@pytest.mark.parametrize(("ends", "code"), [(2, 2), (8, 8), (7, AGAIN), (12, AGAIN), (1, AGAIN)])
def test_a_pod_of_ranks_ends_with_what_a_rank_says(
    pod: Callable[..., Any], index: str, ends: int, code: int
) -> None:
    """torchrun itself ends with 1, as it does for a rank that was killed."""
    paceline = f'if [ "$1" = consume ]; then exit {ends}; fi\n{WAITS}'
    assert pod(RANK, index, paceline=paceline, torchrun=TORCHRUN).wait(30) == code


def test_ranks_of_another_pod_that_end_in_good_order_are_started_again(pod: Callable[..., Any]) -> None:
    """The first pod alone knows whether the work is done; its end is the Job's."""
    assert pod(RANK, "1", paceline="exit 0", torchrun=TORCHRUN).wait(30) == AGAIN


def test_a_pod_that_is_asked_to_end_lets_its_ranks_and_its_producer_end(
    pod: Callable[..., Any], tmp_path: Path
) -> None:
    """Each is asked once, at a safe point it says so, and the pod waits for both."""
    ready, said = tmp_path / "ready", tmp_path / "said"
    os.mkfifo(ready)
    paceline = f"trap 'echo $1 >>{said}; exit 0' TERM\necho $1 >{ready}\nwhile :; do read -rt 1; done"
    process = pod(RANK, paceline=paceline, torchrun=TORCHRUN)
    with ready.open() as told:
        begun = {told.readline()}
    with ready.open() as told:
        begun.add(told.readline())
    process.terminate()
    assert process.wait(30) == 143
    assert sorted(said.read_text().split()) == ["consume", "produce"]


def test_a_producer_s_pod_tries_for_a_while_and_then_tells_why(
    pod: Callable[..., Any], tmp_path: Path
) -> None:
    """The run may not have begun; an error that stays ends this producer, not the others."""
    process = pod(PRODUCER, paceline='echo x >>"$HERE/tries"; exit 2')
    assert process.wait(30) == 2
    assert len((tmp_path / "tries").read_text().split()) == 20
    once = 'echo x >>"$HERE/tries"; if [ "$(wc -l <"$HERE/tries")" = 22 ]; then exit 0; fi; exit 2'
    assert pod(PRODUCER, paceline=once).wait(30) == 0


def test_an_error_that_needs_advice_ends_the_job_and_an_eviction_counts_for_nothing(write: Write) -> None:
    """A Job looks at exit codes only if its pods are not restarted in place."""
    jobs = by_name(read(write(), hosts=4, producers=8), "Job")
    train, produce = (jobs[f"my-run-{role}"]["spec"] for role in ("train", "produce"))
    for job, action, code in ((train, "FailJob", ConfigError), (produce, "FailIndex", ConfigError)):
        first, second = job["podFailurePolicy"]["rules"]
        assert (first["action"], first["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
        assert (second["action"], code.exit_code in second["onExitCodes"]["values"]) == (action, True)
        assert job["template"]["spec"]["restartPolicy"] == "Never"
        [container] = job["template"]["spec"]["containers"]
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    again = {RunBusyError, StoreError, LedgerError, FencedError, RanksError}
    values = train["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    assert not {kind.exit_code for kind in again} & set(values)
    assert AGAIN not in values
    assert (train["backoffLimit"], produce["backoffLimitPerIndex"]) == (4 * RESTARTS, RESTARTS)


def test_torchrun_leaves_its_ranks_the_time_that_the_pod_has(write: Write) -> None:
    """It would kill them after 30 seconds, in the middle of a step or a checkpoint."""
    job = by_name(read(write(), hosts=2), "Job")["my-run-train"]["spec"]
    grace_s = job["template"]["spec"]["terminationGracePeriodSeconds"]
    [given] = re.findall(r"--shutdown-timeout ([0-9]+)", RANK)
    assert 0.8 * grace_s <= int(given) < grace_s


@pytest.mark.parametrize("script", [PRODUCER, RANK])
def test_the_scripts_of_the_pods_pass_shellcheck(script: str) -> None:
    command = [str(SHELLCHECK), "--shell=bash", "-"]
    found = subprocess.run(command, input=script, text=True, capture_output=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"run": {"name": "my-run", "directory": "runs/x"}}, "run.directory runs/x"),
        ({"target": {"model": "/models/m"}}, "target.model /models/m"),
        ({"data": {"path": "/database/x.jsonl", "max_answer_tokens": 8}}, "data source 0 /database"),
        ({"method": {"name": "eagle3", "start_from": "/drafts/x"}}, "method folder 0 /drafts/x"),
        ({"run": {"name": "1-run", "directory": "/data/x"}}, "cannot be the name of a Job"),
        ({"run": {"name": "x" * 60, "directory": "/data/x"}}, "cannot be the name of a Job"),
    ],
)
def test_what_a_pod_would_lose_is_refused(write: Write, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(write(**sections))
    assert caught.value.next


@pytest.mark.parametrize("text", ["data", "=/data", "data=relative", ""])
def test_a_volume_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no volume"):
        volumes_of([text])


def test_a_target_of_the_hub_needs_no_volume(write: Write) -> None:
    assert read(write(target={"model": "Qwen/Qwen3-8B"}))


def test_the_verb_writes_a_file(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "run.k8s.yaml"
    options = ["--image", "paceline:1", "--volume", "data=/data", "-o", str(to)]
    app(["launch", "kubernetes", str(write()), *options], standalone_mode=False)
    assert to.read_text().startswith("# The run my-run on Kubernetes")
    assert "kubectl create secret" in to.read_text()
    assert "--from-literal" not in to.read_text(), "every user of the host can read a command line"
    assert str(to) in capsys.readouterr().out


def test_the_container_file_passes_its_linter() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([linter, ROOT / "Containerfile"], text=True, capture_output=True, check=False)
    assert found.returncode == 0, found.stdout
