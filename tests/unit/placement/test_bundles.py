"""What of a run is placed where on a Ray cluster, and what is refused before anything starts. No Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paceline.config.load import parse_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.placement.bundles import (
    Bundle,
    Node,
    on_gpus,
    placement_of,
    refuse_nodes,
    refuse_secrets,
    sections_of_producer,
    sections_of_trainer,
    variables_needed,
)

REACHED = {
    "ledger": {"store": "redis", "url": "redis://ledgers:6379/0"},
    "features": {"store": "directory", "directory": "/mnt/features"},
}


def made(**sections: dict[str, Any]) -> RunConfig:
    given: dict[str, Any] = {
        "run": {"name": "placed", "directory": "runs/placed"},
        "target": {"model": "/models/target"},
        "prompts": {"path": "train.jsonl"},
        "engine": {"device": "cpu"},
        "features": {},
        "method": {"draft_vocab_size": 48},
        "training": {"device": "cpu"},
        "evaluation": {"prompts": "heldout.jsonl"},
    }
    for name, values in sections.items():
        given[name] = values if name == "engine" else {**given.get(name, {}), **values}
    return parse_run_config(given, source="run.yaml")


def nodes(*cpus: float, gpus: float = 0.0) -> list[Node]:
    return [
        Node(f"n{n}", f"10.0.0.{n}", count, gpus, version="1", has_token=True) for n, count in enumerate(cpus)
    ]


def test_on_one_node_the_whole_run_is_one_bundle() -> None:
    """Nothing has to be reached from elsewhere, so every store and every ledger will do."""
    machine = {"producers": 3, "producer_threads": 2, "consumer_threads": 4}
    placed = placement_of(made(machine=machine), nodes(16))
    assert (placed.beside, placed.apart) == (3, 0)
    assert placed.trainer == Bundle(cpus=4 + 3 * 2)


def test_on_several_nodes_one_producer_stays_beside_the_trainer() -> None:
    machine = {"producers": 3, "producer_threads": 2, "consumer_threads": 4, "trainers": 2}
    placed = placement_of(made(machine=machine, training={"batch_size": 8}, **REACHED), nodes(10, 10, 2))
    assert (placed.beside, placed.apart) == (1, 2)
    assert placed.trainer == Bundle(cpus=2 * 4 + 2)
    assert placed.producer == Bundle(cpus=2)
    assert placed.notes == ()


def test_a_node_without_processors_is_no_place() -> None:
    """Clusters often keep their head free."""
    placed = placement_of(made(machine={"producers": 2}), nodes(0, 8))
    assert (placed.beside, placed.apart) == (2, 0)


def test_gpus_are_those_of_ranks_producers_and_their_servers() -> None:
    cuda = {"engine": {"device": "cuda:0"}, "training": {"device": "cuda:1", "batch_size": 8}}
    placed = placement_of(
        made(machine={"producers": 2, "trainers": 2}, **cuda, **REACHED), nodes(8, 8, gpus=4)
    )
    assert (placed.trainer.gpus, placed.producer.gpus) == (3, 1)
    server = {"name": "vllm", "managed": True, "devices": [0, 1]}
    config = made(engine=server, training={"device": "auto"})
    assert placement_of(config, nodes(8, gpus=4)).trainer.gpus == 3


@pytest.mark.parametrize(("gpus", "wanted"), [(0.0, 0), (2.0, 2)])
def test_auto_means_a_gpu_where_the_cluster_has_some(gpus: float, wanted: int) -> None:
    config = made(engine={"device": "auto"}, training={"device": "auto"})
    assert placement_of(config, nodes(4, gpus=gpus)).trainer.gpus == wanted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, ["features: {store: shm}", "ledger: {store: sqlite}"]),
        ({"ledger": REACHED["ledger"]}, ["features: {store: shm}"]),
        ({"features": REACHED["features"]}, ["ledger: {store: sqlite}"]),
    ],
)
def test_what_one_host_holds_is_refused_on_several_nodes(given: dict[str, Any], named: list[str]) -> None:
    """Also for one producer: the trainer itself could not go on elsewhere."""
    with pytest.raises(ConfigError) as caught:
        placement_of(made(**given), nodes(4, 4))
    assert all(name in caught.value.what for name in named)
    assert "Nothing was started" in caught.value.why
    assert "store: redis" in caught.value.next


def test_a_bundle_that_no_node_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="trainer, with the producer beside it needs 9 CPUs on one node"):
        placement_of(made(machine={"consumer_threads": 8}), nodes(8))
    gpu = {"engine": {"device": "cuda:0"}, "training": {"device": "cuda:1"}}
    with pytest.raises(ConfigError, match="2 CPUs and 2 GPUs"):
        placement_of(made(**gpu), nodes(8, gpus=1))
    with pytest.raises(ConfigError, match="no node has a CPU"):
        placement_of(made(), nodes(0))


def test_a_trainer_that_only_one_node_can_hold_is_told() -> None:
    placed = placement_of(made(machine={"consumer_threads": 4}, **REACHED), nodes(8, 2))
    assert "only one node can hold the trainer" in placed.notes[0]


def test_nodes_that_do_not_fit_are_named_with_all_that_is_wrong() -> None:
    a, b, c, d = nodes(1, 1, 1, 1)
    found = [
        replace(a, version="2"),
        replace(b, has_token=False),
        replace(c, lacks=("PACELINE_REDIS_PASSWORD in its environment", "/models/target")),
        replace(d, problem="a task on it failed"),
    ]
    refuse_nodes([a, b], "1")
    with pytest.raises(ConfigError) as caught:
        refuse_nodes(found, "1")
    for told in (
        "for 5 reasons",
        "10.0.0.0 has Paceline 2, and here is 1",
        "10.0.0.1 takes calls without a token",
        "10.0.0.2 lacks PACELINE_REDIS_PASSWORD",
        "10.0.0.2 lacks /models/target",
        "10.0.0.3: a task on it failed",
    ):
        assert told in caught.value.what


def test_no_secret_goes_through_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the address of the ledger nor in what is sent instead of the run file."""
    secret = "redis://user:hunter2@ledgers:6379/0"  # noqa: S105 (a test's own)
    with pytest.raises(ConfigError, match="a user or a password") as caught:
        refuse_secrets(secret)
    assert "hunter2" not in str(caught.value)
    refuse_secrets("redis://ledgers:6379/0")
    refuse_secrets(None)
    monkeypatch.setenv("PACELINE_REDIS_PASSWORD", "hunter2")
    config = made(features=REACHED["features"], ledger={"store": "redis", "url": secret})
    assert variables_needed(config) == ["PACELINE_REDIS_PASSWORD"]
    placed = placement_of(config, nodes(4, 4))
    assert "hunter2" not in str(sections_of_trainer(config, placed.beside, "runs/placed"))
    assert variables_needed(made()) == []


def test_a_producer_has_a_run_folder_of_its_own_and_nothing_else_changes() -> None:
    config = made(machine={"producers": 3}, **REACHED)
    sections = sections_of_producer(config, "runs/placed/placed/producer-1")
    again = parse_run_config(sections, source="it")
    assert again.run.directory == Path("runs/placed/placed/producer-1")
    changed = again.model_copy(update={"run": config.run})
    assert changed == config
    placed = placement_of(config, nodes(4, 4))
    trainer = parse_run_config(sections_of_trainer(config, placed.beside, "runs/placed"), source="it")
    assert trainer.machine.producers == 1


def test_devices_are_those_that_ray_reserved() -> None:
    """A server is told their numbers; a process sees only its own, and counts them from 0."""
    cuda = {"engine": {"device": "cuda:3"}, "training": {"device": "auto"}}
    config = made(machine={"producers": 2}, **cuda, **REACHED)
    placed = placement_of(config, nodes(4, 4, gpus=2))
    sections = sections_of_trainer(config, placed.beside, "runs/placed")
    mine = on_gpus(sections, [5, 7], placed, trains=True)
    assert (mine["engine"]["device"], mine["training"]["device"]) == ("cuda:0", "cuda:1")
    other = on_gpus(sections, [6], placed, trains=False)
    assert (other["engine"]["device"], other["training"]["device"]) == ("cuda:0", "auto")

    server = {"name": "vllm", "managed": True, "devices": [0]}
    config = made(engine=server, training={"device": "auto"}, **REACHED)
    placed = placement_of(config, nodes(4, 4, gpus=2))
    served = on_gpus(sections_of_trainer(config, placed.beside, "runs/placed"), [5, 7], placed, trains=True)
    assert served["engine"]["devices"] == [0], "the server counts what this command sees"
    assert served["training"]["device"] == "cuda:1"
    parse_run_config(served, source="it")
