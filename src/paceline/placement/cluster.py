"""A connection to a Ray cluster: its nodes, and the actors of a run in it. Ray is imported on connecting."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.placement.bundles import Node, seen_on, variables_needed

LOCAL = "local"
PLACED = "placed"  # the folder of what is placed, in the run's
NAMESPACE = "paceline"
PROBE_S = 60.0
ATTEMPTS = 3  # to reach a head that is slow to start what speaks for a client


@dataclass(frozen=True)
class Names:
    """How a run's actors are called in the cluster."""

    run: str

    @classmethod
    def of(cls, config: RunConfig) -> Names:
        place = hashlib.sha256(str(config.run.directory.absolute()).encode()).hexdigest()[:8]
        return cls(f"{config.run.name}-{place}")

    @property
    def trainer(self) -> str:
        return f"{self.run}:trainer"

    def producer(self, number: int) -> str:
        return f"{self.run}:producer-{number}"


class Cluster:
    """A connection to a Ray cluster."""

    def __init__(self, ray: Any, actors: Any) -> None:
        """The modules."""
        self.ray, self.actors = ray, actors

    def nodes(self) -> list[Node]:
        return [
            Node(
                str(node["NodeID"]),
                str(node["NodeManagerAddress"]),
                float(node["Resources"].get("CPU", 0.0)),
                float(node["Resources"].get("GPU", 0.0)),
            )
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def examined(self, config: RunConfig, nodes: Sequence[Node]) -> list[Node]:
        """Every node, as a task on it finds it. With several, each must see the same run folder."""
        useful = [node for node in nodes if node.cpus >= 1]
        several = len(useful) > 1
        folder, variables = str(Path.cwd()), variables_needed(config)
        paths = _paths(config)
        mark = str(config.run.directory / f".{PLACED}-{secrets.token_hex(8)}") if several else ""
        found: dict[str, dict[str, Any]] = {}
        for node in [*useful, *(node for node in nodes if node not in useful)]:
            look = self._on(node, self.actors.found_here)
            marks = not any("has" in one for one in found.values())  # none that was asked could
            asked = look.remote(folder, paths, variables, mark if node in useful else "", marks=marks)
            found[node.id] = self._answer(asked)
        if mark:
            for node in [node for node in useful if "has" in found[node.id]][:1]:
                self._answer(self._on(node, self.actors.unmark).remote(folder, mark))
        anywhere = {path for one in found.values() for path in one.get("has", ())}
        for node in useful:
            one = found[node.id]
            one["lacks"] = [*one.get("lacks", ()), *sorted(anywhere - set(one.get("has", anywhere)))]
        for node in nodes:
            if node not in useful:
                found[node.id]["lacks"] = []
        return [seen_on(node, found[node.id]) for node in nodes]

    def _on(self, node: Node, work: Any) -> Any:
        strategy = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)
        return self.ray.remote(work).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)

    def _answer(self, asked: Any) -> dict[str, Any]:
        try:
            told: dict[str, Any] | None = self.ray.get(asked, timeout=PROBE_S)
        except Exception as error:  # noqa: BLE001 (Ray raises what a node's Python raised)
            return {"problem": f"a task on it failed ({' '.join(str(error).split())[-300:]})"}
        return told or {}

    def actor(self, name: str) -> Any | None:
        """The actor of this name, if there is one."""
        try:
            return self.ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None

    def names(self, run: str) -> list[str]:
        """Of all actors of the run; the trainer's last."""
        listed = self.ray.util.list_named_actors(all_namespaces=True)
        names = [one["name"] for one in listed if one["namespace"] == NAMESPACE]
        return sorted(name for name in names if name.rpartition(":")[0] == run)

    def end_all(self, names: Names) -> list[str]:
        """Remove the run's actors; their names."""
        found = self.names(names.run)
        for name in found:
            self.end(name)
        return found

    @contextmanager
    def losing(self, error: Exception) -> Iterator[None]:
        """Raise `error` where the connection to the cluster ends."""
        try:
            yield
        except (self.ray.exceptions.RayError, ConnectionError) as lost:
            raise error from lost

    def end(self, name: str) -> None:
        actor = self.actor(name)
        if actor is not None:
            self.ray.kill(actor, no_restart=True)


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """A cluster: `local` for one that lives as long as this process, else as Ray names it ("auto", "ray://...").

    Raises ConfigError.
    """
    if address == LOCAL:
        os.environ |= of_a_local_cluster()
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"Ray cannot be imported ({error}).",
            why="--on has a Ray cluster place the run's processes.",
            next="pip install 'paceline[ray]', or leave out --on.",
        ) from error
    _connect(ray, address)
    try:
        yield Cluster(ray, import_module("paceline.placement.actors"))
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Raises ConfigError.

    The head of ray://... starts a server for each client, and gives one up that does not answer soon enough
    (ConnectionAbortedError). A head with much other work is asked again.
    """
    of_its_own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    more: dict[str, Any] = of_its_own if address == LOCAL else {}
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="error", **more)
        except Exception as error:
            if attempts_left and isinstance(error, ConnectionAbortedError):
                continue
            raise ConfigError(
                f"The Ray cluster {address} cannot be reached ({' '.join(str(error).split())[:500]}).",
                why="Nothing was started.",
                next="check the address, and that this machine has the cluster's token (docs/ray.md); "
                "or use --on local.",
            ) from error
        return


def of_a_local_cluster() -> dict[str, str]:
    """Variables for a cluster of one's own: it has a token that is in no file, and sends no usage report."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {**token, "RAY_USAGE_STATS_ENABLED": "0"}


def _paths(config: RunConfig) -> list[str]:
    """Files and folders that the run file names: what one node has, every node needs."""
    named = [config.evaluation.prompts, *(source.path for source in config.data.sources or ())]
    shared = [config.features.directory] if config.features.is_shared and config.features.in_directory else []
    return [str(path) for path in [config.target.model, *named, *shared, *config.method.folders]]
