"""A run as Kubernetes manifests: a Job that trains, a Job of producers that join, and the ledger's server.

The run file lies in a ConfigMap, the server's password in a Secret that the user makes; no manifest holds it.
Every process runs without root and without privileges; /dev/shm is memory of its own, sized for the features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from paceline.errors import ConfigError
from paceline.features.settings import MEMORY
from paceline.launch.fleet import Fleet, Needs
from paceline.launch.pod_scripts import FINAL, GRACE_S, MEET_PORT, OF_A_PRODUCER, PRODUCER, RANK, SETTINGS
from paceline.ledger.server_url import IN_ENVIRONMENT
from paceline.target.hub import is_of_hub

Manifest = dict[str, Any]
USER = 1000
OWN_FOLDER = "/tmp/paceline/run"  # noqa: S108 (of the container alone)
DATA, SECRETS = "/data", "/run/secrets/paceline"  # of the ledger's server
LEDGER_PORT = 6379
LEDGER_IMAGE = "docker.io/valkey/valkey:8.1-alpine"
LEDGER_MIB = 2048
RESTARTS = 50  # of each of its pods, before a Job counts as failed; evictions do not count
NAME_MAX = 40  # characters: a pod's name gets more behind it


@dataclass(frozen=True)
class Volume:
    """A claim, mounted at `path` in every container."""

    claim: str
    path: str


def volumes_of(given: Sequence[str]) -> list[Volume]:
    """From CLAIM=/PATH. Raises ConfigError."""
    found = []
    for text in given:
        claim, _, path = text.partition("=")
        if not claim or not path.startswith("/") or claim != claim.strip():
            raise ConfigError(
                f"{text!r} is no volume.",
                why="A volume names a claim of the cluster, and the path at which the containers see it.",
                next="write it as --volume CLAIM=/PATH",
            )
        found.append(Volume(claim, path))
    return found


def manifests(fleet: Fleet, *, image: str, volumes: Sequence[Volume]) -> list[Manifest]:
    """Raises ConfigError for a run file whose folders the pods would lose."""
    _refuse(fleet, volumes)
    pods = Pods(fleet, image, volumes)
    found = [pods.settings(), pods.trainer()]
    if fleet.hosts > 1:
        found += pods.meeting_point()
    if fleet.producers:
        found.append(pods.producers())
    if pods.has_server:
        found += pods.server()
    return found


def text_of(fleet: Fleet, found: Sequence[Manifest]) -> str:
    """As YAML, with what to type in its first lines."""
    lines = [f"The run {fleet.name} on Kubernetes, by `paceline launch kubernetes`."]
    if fleet.config.ledger.is_shared:
        lines += [
            "First, a password for the ledger's server (one of your own: its password), in no command line:",
            f"  openssl rand -hex 32 | tr -d '\\n' | kubectl create secret generic {_name(fleet)}-ledger "
            "--from-file=password=/dev/stdin",
        ]
    lines += ["Then: kubectl apply -f FILE. Deleting a Job stops it; applying it again goes on."]
    return "".join(f"# {line}\n" for line in lines) + yaml.dump_all(found, Dumper=Readable, sort_keys=False)


class Readable(yaml.SafeDumper):
    """Texts of several lines, such as run files, stand as they are."""

    def ignore_aliases(self, _: object) -> bool:
        return True


def _text(dumper: Readable, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Readable.add_representer(str, _text)


class Pods:
    def __init__(self, fleet: Fleet, image: str, volumes: Sequence[Volume]) -> None:
        self._fleet, self._image, self._volumes = fleet, image, volumes
        self._name = _name(fleet)

    @property
    def has_server(self) -> bool:
        """Whether the ledger's server is one of the manifests: the run file names none."""
        ledger = self._fleet.config.ledger
        return ledger.is_shared and getattr(ledger, "url", None) is None

    def settings(self) -> Manifest:
        fleet = self._fleet
        # The same values as in the run file, which may have any encoding and comments.
        own = yaml.safe_dump(fleet.sections, sort_keys=False)
        elsewhere = {"run": fleet.section_elsewhere(OWN_FOLDER)}
        files = {"run.yaml": own}
        if fleet.is_wide:
            section = yaml.safe_dump(elsewhere, sort_keys=False)
            files["elsewhere.yaml"] = section + fleet.sections_elsewhere()
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": self._metadata("settings"),
            "data": files,
        }

    def trainer(self) -> Manifest:
        fleet, run = self._fleet, f"{SETTINGS}/run.yaml"
        if fleet.hosts == 1:
            command, more = ["paceline", "train", run], {}
        else:
            command = ["bash", "-c", RANK]
            first = f"{self._name}-train-0.{self._name}-train"
            more = {"HOSTS": fleet.hosts, "RANKS": fleet.config.machine.trainers, "MEET": first}
        container = self._container("train", command, fleet.trainer, more)
        # Not a liveness probe: the supervisor starts what dies again, and restarts would cost work.
        container["readinessProbe"] = {
            "exec": {"command": ["paceline", "status", run]},
            "periodSeconds": 60,
            "timeoutSeconds": 30,
        }
        job = self._job("train", container, fleet.trainer, fleet.hosts)
        job["spec"] |= {"backoffLimit": RESTARTS * fleet.hosts, **_ends_with("FailJob", FINAL)}
        if fleet.hosts > 1:
            job["spec"]["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}
            job["spec"]["template"]["spec"]["subdomain"] = f"{self._name}-train"
        return job

    def producers(self) -> Manifest:
        needs = self._fleet.producer
        container = self._container("produce", ["bash", "-c", PRODUCER], needs, {})
        job = self._job("produce", container, needs, self._fleet.producers)
        # The others go on without one.
        job["spec"] |= {"backoffLimitPerIndex": RESTARTS, **_ends_with("FailIndex", OF_A_PRODUCER)}
        return job

    def meeting_point(self) -> list[Manifest]:
        """The names by which the ranks' pods find each other, also before they are ready. No other pod
        reaches the ports of torchrun, gloo and NCCL, which know no password."""
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self._metadata("train"),
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": self._labels("train"),
                "ports": [{"name": "meet", "port": MEET_PORT}],
            },
        }
        return [service, self._policy("train", {"from": [_pods(self._labels("train"))]})]

    # -- the ledger's server -----------------------------------------------------------------

    def server(self) -> list[Manifest]:
        """It keeps its data in an append-only file on a volume of its own; this run's pods alone reach it."""
        labels, role = self._labels("ledger"), self._metadata("ledger")
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": role,
            "spec": {"selector": labels, "ports": [{"name": "ledger", "port": LEDGER_PORT}]},
        }
        policy = self._policy("ledger", {"from": [_pods(self._labels())], "ports": [{"port": LEDGER_PORT}]})
        return [service, policy, self._stateful_set(labels, role)]

    def _policy(self, role: str, ingress: Manifest) -> Manifest:
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": self._metadata(role),
            "spec": {**_pods(self._labels(role)), "policyTypes": ["Ingress"], "ingress": [ingress]},
        }

    def _stateful_set(self, labels: Mapping[str, str], metadata: Manifest) -> Manifest:
        ping = {"exec": {"command": ["sh", "-c", "valkey-cli ping | grep -q PONG"]}, "timeoutSeconds": 5}
        # The password stands in a file in memory: every user of the node can read a command line.
        serve = (
            f'umask 077 && printf "requirepass %s\\n" "$REDISCLI_AUTH" >{SECRETS}/valkey.conf && '
            f"exec valkey-server {SECRETS}/valkey.conf --dir {DATA} --port {LEDGER_PORT} --appendonly yes "
            f"--appendfsync always --maxmemory-policy noeviction --maxmemory {LEDGER_MIB * 3 // 4}mb"
        )
        memory = {"memory": f"{LEDGER_MIB}Mi"}
        container = {
            "name": "valkey",
            "image": LEDGER_IMAGE,
            "command": ["sh", "-c", serve],
            "env": [{"name": "REDISCLI_AUTH", "valueFrom": self._password()}],
            "ports": [{"containerPort": LEDGER_PORT}],
            "resources": {"requests": {"cpu": "1", **memory}, "limits": memory},
            "readinessProbe": {**ping, "periodSeconds": 5},
            # It loads its file before it answers, minutes if it is large.
            "startupProbe": {**ping, "periodSeconds": 10, "failureThreshold": 60},
            "livenessProbe": {**ping, "periodSeconds": 20, "failureThreshold": 6},
            "securityContext": _unprivileged(),
            "volumeMounts": [
                {"name": "data", "mountPath": DATA},
                {"name": "secrets", "mountPath": SECRETS},
            ],
        }
        claim = {
            "metadata": {"name": "data"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "10Gi"}}},
        }
        return {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": metadata,
            "spec": {
                "serviceName": metadata["name"],
                "replicas": 1,
                "selector": {"matchLabels": dict(labels)},
                "template": {
                    "metadata": {"labels": dict(labels)},
                    "spec": {
                        **_pod(),
                        "terminationGracePeriodSeconds": 60,
                        "containers": [container],
                        "volumes": [
                            {"name": "secrets", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}
                        ],
                    },
                },
                "volumeClaimTemplates": [claim],
            },
        }

    # -- what the jobs have in common --------------------------------------------------------

    def _job(self, role: str, container: Manifest, needs: Needs, pods: int) -> Manifest:
        volumes = [
            {"name": "settings", "configMap": {"name": f"{self._name}-settings"}},
            {"name": "shm", "emptyDir": _memory(f"{needs.shm_mib}Mi")},
            {"name": "tmp", "emptyDir": {}},
            *(
                {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": one.claim}}
                for number, one in enumerate(self._volumes)
            ),
        ]
        pod = {
            **_pod(),
            "terminationGracePeriodSeconds": GRACE_S,
            "restartPolicy": "Never",  # a Job looks at exit codes of pods alone; it makes new ones
            "containers": [container],
            "volumes": volumes,
        }
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": self._metadata(role),
            "spec": {
                "completionMode": "Indexed",
                "completions": pods,
                "parallelism": pods,
                "template": {"metadata": {"labels": self._labels(role)}, "spec": pod},
            },
        }

    def _container(
        self, role: str, command: Sequence[str], needs: Needs, more: Mapping[str, object]
    ) -> Manifest:
        gpus = {"nvidia.com/gpu": str(needs.gpus)} if needs.gpus else {}
        asked = {"memory": f"{needs.memory_mib}Mi", **gpus}
        return {
            "name": role,
            "image": self._image,
            "command": list(command),
            "env": [
                {"name": "HOME", "value": "/tmp"},  # noqa: S108 (of the container alone)
                *({"name": name, "value": str(value)} for name, value in more.items()),
                *self._ledger_of_the_environment(),
            ],
            "resources": {"requests": {"cpu": str(needs.processors), **asked}, "limits": asked},
            "terminationMessagePolicy": "FallbackToLogsOnError",  # the pod's status tells the error
            "securityContext": _unprivileged(),
            "volumeMounts": [
                {"name": "settings", "mountPath": SETTINGS, "readOnly": True},
                {"name": "shm", "mountPath": str(MEMORY)},
                {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 (of the container alone)
                *(
                    {"name": f"volume-{number}", "mountPath": one.path}
                    for number, one in enumerate(self._volumes)
                ),
            ],
        }

    def _ledger_of_the_environment(self) -> list[Manifest]:
        if not self._fleet.config.ledger.is_shared:
            return []
        where = {"name": IN_ENVIRONMENT, "value": f"redis://{self._name}-ledger:{LEDGER_PORT}/0"}
        password = {"name": "PACELINE_REDIS_PASSWORD", "valueFrom": self._password()}
        return [*([where] if self.has_server else []), password]

    def _password(self) -> Manifest:
        return {"secretKeyRef": {"name": f"{self._name}-ledger", "key": "password"}}

    def _labels(self, role: str = "") -> dict[str, str]:
        labels = {"app.kubernetes.io/name": "paceline", "app.kubernetes.io/instance": self._name}
        return labels | ({"app.kubernetes.io/component": role} if role else {})

    def _metadata(self, role: str) -> Manifest:
        return {"name": f"{self._name}-{role}", "labels": self._labels(role)}


def _ends_with(action: str, codes: Sequence[int]) -> Manifest:
    """What a container's exit code ends; an eviction ends nothing, and is not counted."""
    evicted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": evicted},
                {"action": action, "onExitCodes": {"operator": "In", "values": list(codes)}},
            ]
        }
    }


def _pod() -> Manifest:
    return {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _memory(size: str) -> Manifest:
    return {"medium": "Memory", "sizeLimit": size}


def _pods(labels: Mapping[str, str]) -> Manifest:
    return {"podSelector": {"matchLabels": dict(labels)}}


def _unprivileged() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _name(fleet: Fleet) -> str:
    """The run's name as Kubernetes takes one, and no other run's. Raises ConfigError if it is too long."""
    name = fleet.name.lower().replace("_", "-").replace(".", "-").strip("-")
    if name != fleet.name:
        name += f"-{hashlib.sha256(fleet.name.encode()).hexdigest()[:6]}"
    if len(name) > NAME_MAX or not name or not name[0].isalpha():
        raise ConfigError(
            f"run.name {fleet.name} cannot be the name of a Job.",
            why=f"A Job's name begins with a letter, and here has at most {NAME_MAX} characters.",
            next="choose another run.name.",
        )
    return name


def _refuse(fleet: Fleet, volumes: Sequence[Volume]) -> None:
    """What lies outside of the volumes ends with its pod, or is not there."""
    fleet.refuse_a_server_nearby()
    config = fleet.config
    needed = {"run.directory": config.run.directory, "evaluation.prompts": config.evaluation.prompts}
    if not is_of_hub(config.target):
        needed["target.model"] = config.target.model
    if config.features.is_shared and config.features.in_directory:
        needed["features.directory"] = config.features.directory
    if (answers := getattr(config.features, "answers", None)) is not None:
        needed["features.answers"] = answers
    read = [config.data.other_run, *(source.path for source in config.data.sources)]
    needed |= {f"data source {number}": path for number, path in enumerate(filter(None, read))}
    needed |= {f"method folder {number}": path for number, path in enumerate(config.method.folders)}
    outside = [
        f"{name} {path}"
        for name, path in needed.items()
        if not any(path.is_relative_to(one.path) for one in volumes)
    ]
    if outside:
        raise ConfigError(
            f"No volume holds {', '.join(outside)}.",
            why="A pod sees only the folders that it mounts, and its own files end with it.",
            next="mount claims with --volume CLAIM=/PATH, and name paths below them in the run file.",
        )
