"""What `paceline train --on` places on a Ray cluster: bundles of resources, from the run file. No Ray.

The trainer's bundle holds every rank, and the producers beside it; on a cluster of several nodes that is one
producer, which outlives all others of the run, and each further producer has a bundle of its own. Ranks never
leave their node: gloo and NCCL have no passwords.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paceline.config.load import given_sections
from paceline.config.run import RunConfig
from paceline.errors import ConfigError

SECRETS = ("PACELINE_REDIS_USER", "PACELINE_REDIS_PASSWORD", "PACELINE_REDIS_URL")
CUDA = "cuda"


@dataclass(frozen=True)
class Bundle:
    """What Ray reserves on one node for one command."""

    cpus: int
    gpus: int = 0

    def fits(self, node: Node) -> bool:
        return self.cpus <= node.cpus and self.gpus <= node.gpus

    def __str__(self) -> str:
        return f"{self.cpus} CPUs" + (f" and {self.gpus} GPUs" if self.gpus else "")


@dataclass(frozen=True)
class Node:
    """A live node of the cluster. The rest is what a task on it has found; "" and () before.

    `version`: Paceline's; `problem`: why the node cannot run Paceline; `lacks`: folders and variables of the
    environment that the run needs.
    """

    id: str
    address: str
    cpus: float
    gpus: float = 0.0
    version: str = ""
    has_token: bool = False
    problem: str = ""
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """`beside`: the producers that the trainer's command starts; `apart`: those with bundles of their own."""

    trainer: Bundle
    producer: Bundle
    beside: int
    apart: int
    notes: tuple[str, ...] = ()


def placement_of(config: RunConfig, nodes: Sequence[Node]) -> Placement:
    """Raises ConfigError if the run cannot be placed on these nodes, or would not survive one of them."""
    useful = [node for node in nodes if node.cpus >= 1]
    on_gpus = any(node.gpus for node in useful)
    machine = config.machine
    producer = Bundle(machine.producer_threads, producer_gpus(config, on_gpus=on_gpus))
    apart = machine.producers - 1 if len(useful) > 1 else 0
    beside = machine.producers - apart
    trainer = Bundle(
        machine.trainers * machine.consumer_threads + beside * machine.producer_threads,
        trainer_gpus(config, on_gpus=on_gpus) + producer.gpus,
    )
    if len(useful) > 1:
        _refuse_what_one_host_holds(config, len(useful))
    _refuse_too_large("trainer, with the producer beside it", trainer, useful)
    if apart:
        _refuse_too_large("producer", producer, useful)
    notes = []
    if len(useful) > 1 and sum(trainer.fits(node) for node in useful) == 1:
        notes.append(
            f"only one node can hold the trainer ({trainer}): if it dies, the run waits until it is back"
        )
    return Placement(trainer, producer, beside, apart, tuple(notes))


def producer_gpus(config: RunConfig, *, on_gpus: bool) -> int:
    """GPUs of one producer, with the server that it starts; `on_gpus`: the cluster has some."""
    engine = config.engine
    devices: Sequence[int] | None = getattr(engine, "devices", None)
    if devices is not None:
        return len(devices)
    return _gpus_of(getattr(engine, "device", "cpu"), on_gpus=on_gpus)


def trainer_gpus(config: RunConfig, *, on_gpus: bool) -> int:
    """GPUs of all ranks: one each."""
    return config.machine.trainers * _gpus_of(config.training.device, on_gpus=on_gpus)


def _gpus_of(device: str, *, on_gpus: bool) -> int:
    return int(device.startswith(CUDA) or (device == "auto" and on_gpus))


def _refuse_what_one_host_holds(config: RunConfig, nodes: int) -> None:
    lies = {
        f"features: {{store: {config.features.store}}}": config.features.is_shared,
        f"ledger: {{store: {config.ledger.store}}}": config.ledger.is_shared,
    }
    on_one_host = [section for section, is_shared in lies.items() if not is_shared]
    if on_one_host:
        raise ConfigError(
            f"The cluster has {nodes} nodes, and only one host reaches {' and '.join(on_one_host)}.",
            why="A role that is placed on another node, at the start or after a node has died, would find "
            "neither samples nor its place. Nothing was started.",
            next="set ledger: {store: redis, url: ...} and features: {store: directory, directory: ...} to "
            "what every node reaches (docs/operations.md); or use one node: --on local.",
        )


def _refuse_too_large(what: str, bundle: Bundle, nodes: Sequence[Node]) -> None:
    if not any(bundle.fits(node) for node in nodes):
        largest = ", ".join(f"{node.address}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes)
        raise ConfigError(
            f"The {what} needs {bundle} on one node, and none has them ({largest or 'no node has a CPU'}).",
            why="Ray would wait for such a node for ever. Nothing was started.",
            next="lower machine.producer_threads, consumer_threads, trainers or producers, or add a node.",
        )


def refuse_nodes(nodes: Sequence[Node], version: str) -> None:
    """Raise ConfigError if nodes cannot take the run's roles. `version`: of Paceline here."""
    found = []
    for node in nodes:
        if node.problem:
            found.append(f"{node.address}: {node.problem}")
        elif node.version != version:
            found.append(
                f"{node.address} has Paceline {node.version or 'not installed'}, and here is {version}"
            )
        elif not node.has_token:
            found.append(f"{node.address} takes calls without a token")
        found += [f"{node.address} lacks {thing}" for thing in node.lacks]
    if found:
        raise ConfigError(
            f"The cluster does not fit the run, for {len(found)} reasons: {'; '.join(found)}.",
            why="A role could be placed on any of these nodes. Nothing was started.",
            next="mend them and run the same command again; docs/ray.md says what each node needs.",
        )


def refuse_secrets(url: str | None) -> None:
    """Raise ConfigError if the run file's address of the ledger holds a password: Ray would record it."""
    if url is not None and "@" in url:
        raise ConfigError(
            "ledger.url in the run file has a user or a password in it.",
            why="What is placed by Ray goes through its records, so Paceline sends no secret with it.",
            next=f"remove them from the run file, and set {SECRETS[0]} and {SECRETS[1]} on every node before "
            "`ray start`, and here.",
        )


def sections_of_trainer(config: RunConfig, beside: int, directory: str) -> dict[str, Any]:
    """The run file of the trainer's command, as JSON values without a secret. `beside`: see Placement."""
    return _with(given_sections(config), machine={"producers": beside}, run={"directory": directory})


def sections_of_producer(config: RunConfig, directory: str) -> dict[str, Any]:
    """The run file of a producer's command, whose run folder is `directory`."""
    return _with(given_sections(config), run={"directory": directory})


def on_gpus(
    sections: Mapping[str, Any], gpus: Sequence[int], placement: Placement, *, trains: bool
) -> dict[str, Any]:
    """The sections with the devices that Ray has reserved on this node; `gpus`: their numbers there.

    The first ones are the producer's. The command sees only these devices, and counts them from 0.
    """
    given = dict(sections)
    first = placement.producer.gpus
    if first and len(gpus) >= first:
        engine = given["engine"]
        told = {"devices": list(range(first))} if "devices" in engine else {"device": f"{CUDA}:0"}
        given = _with(given, engine=told)
    if trains and len(gpus) > first:
        given = _with(given, training={"device": f"{CUDA}:{first}"})
    return given


def _with(sections: Mapping[str, Any], **changed: Mapping[str, Any]) -> dict[str, Any]:
    return {**sections, **{name: {**sections.get(name, {}), **values} for name, values in changed.items()}}


def variables_needed(config: RunConfig) -> list[str]:
    """Names of variables that this environment has, or the run file names, and every node must have too."""
    named = getattr(config.engine, "api_key_variable", None)
    secrets = [name for name in SECRETS if name in os.environ] if config.ledger.is_shared else []
    return [*secrets, *([named] if named else [])]


def seen_on(node: Node, found: Mapping[str, Any]) -> Node:
    """The node, with what a task on it has found."""
    return replace(
        node,
        version=str(found.get("version", "")),
        has_token=bool(found.get("has_token")),
        problem=str(found.get("problem", "")),
        lacks=tuple(found.get("lacks", ())),
    )
