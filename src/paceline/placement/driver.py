"""`paceline train --on` and `paceline stop --on`: have a Ray cluster keep a run going, follow it, stop it.

The process that follows decides nothing: the actors go on without it, and the same command finds them again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from paceline import __version__
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError, PacelineError
from paceline.placement.bundles import (
    Placement,
    placement_of,
    refuse_nodes,
    refuse_secrets,
    sections_of_producer,
    sections_of_trainer,
)
from paceline.placement.cluster import LOCAL, PLACED, Cluster, Names, connected
from paceline.placement.keeper import GOING_ON, Order
from paceline.placement.rules import INTERRUPTED, Verdict
from paceline.roles.child import RoleFailedError
from paceline.roles.process import stop_signals

LOOK_S = 0.5
WAITS_S = 15.0  # until it is told that nothing is heard
STOP_S = 120.0  # for a checkpoint, and for the producers after it


def order_of_trainer(config: RunConfig, beside: int) -> Order:
    """`beside`: how many producers its command starts."""
    return Order(
        "the trainer",
        "train",
        sections_of_trainer(config, beside, str(config.run.directory)),
        str(config.run.directory / PLACED / "trainer.yaml"),
        str(Path.cwd()),
    )


def orders_of(config: RunConfig, placement: Placement, names: Names) -> tuple[Order, dict[str, Order]]:
    """The trainer's order, and those of the producers that are placed apart, by their actors' names."""
    folder, placed = str(Path.cwd()), config.run.directory / PLACED
    trainer = order_of_trainer(config, placement.beside)
    producers = {}
    for number in range(1, placement.apart + 1):
        home = placed / f"producer-{number}"
        sections = sections_of_producer(config, str(home))
        producers[names.producer(number)] = Order(
            f"producer {number}", "produce", sections, str(home / "run.yaml"), folder, ("--join",)
        )
    return trainer, producers


def train_on(run_file: Path, address: str, tell: Callable[[str], None]) -> int:
    """Follow the run to its end, and start it before if the cluster does not have it; its exit code.

    A run that is going on is followed whatever has become of the cluster. `tell` gets each line of the run's
    commands. Raises PacelineError.
    """
    config = load_run_config(run_file)
    names = Names.of(config)
    with connected(address) as cluster:
        refuse_secrets(getattr(config.ledger, "url", None))
        actor, trainer = cluster.actor(names.trainer), order_of_trainer(config, config.machine.producers)
        needs = "that has room for it"
        if actor is None:
            actor, trainer, placement = _placed(cluster, config, names, tell)
            needs = f"with {placement.trainer}"
        else:
            tell(f"The run is going on in this cluster already ({names.trainer}); this command follows it.")
        follower = Follower(cluster, names, actor, trainer, f"{run_file} --on {address}", tell)
        with cluster.losing(lost_cluster(f"train {run_file}", address)):
            code = follower.follow(needs)
            cluster.end_all(names)
        return code


def _placed(
    cluster: Cluster, config: RunConfig, names: Names, tell: Callable[[str], None]
) -> tuple[Any, Order, Placement]:
    """The trainer's actor, new in the cluster or another command's, and its order. Raises ConfigError."""
    nodes = cluster.nodes()
    placement = placement_of(config, nodes)
    refuse_nodes(cluster.examined(config, nodes), __version__)
    for note in placement.notes:
        tell(f"note: {note}")
    trainer, producers = orders_of(config, placement, names)
    if cluster.actor(names.trainer) is None:  # else another command was faster than the look at the nodes
        cluster.end_all(names)  # producers whose trainer was removed from the cluster
    kind = cluster.actors.actor_of(cluster.actors.TrainerActor, names.trainer, placement.trainer)
    return kind.remote(trainer, placement, producers), trainer, placement


def stop_on(run_file: Path, address: str, tell: Callable[[str], None], *, at_once: bool) -> None:
    """Stop the run's actors in the cluster, and wait for them. Raises ConfigError, PacelineError."""
    if address == LOCAL:
        raise ConfigError(
            "A local cluster ends with the command that started it.",
            next=f"paceline stop {run_file}",
        )
    config = load_run_config(run_file)
    names = Names.of(config)
    with connected(address) as cluster:
        with cluster.losing(lost_cluster(f"stop {run_file}", address)):
            actor = cluster.actor(names.trainer)
            if actor is not None:
                tell(f"stopping the trainer {'at once' if at_once else 'at its next safe point'} ...")
                shown = f"{run_file} --on {address}"
                Follower(cluster, names, actor, None, shown, lambda _: None).stop(at_once=at_once)
            left = cluster.end_all(names)
        tell("Stopped." if actor is not None or left else "No process of the run is in this cluster.")


def lost_cluster(command: str, address: str) -> PacelineError:
    """The connection ended, and not by the command's will."""
    return PacelineError(
        f"The connection to the Ray cluster {address} was lost.",
        why="Its head has ended, or the network between is cut. The run goes on as long as its nodes do; "
        "what a checkpoint covers is safe.",
        next=f"paceline {command} --on {address}, which finds the run if the cluster lives; in a new cluster "
        "the run goes on where it was.",
    )


def _settings(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the run file; how many producers are beside the trainer follows from the nodes."""
    machine = {name: value for name, value in sections.get("machine", {}).items() if name != "producers"}
    return {**sections, "machine": machine}


class Follower:
    """Shows what the trainer's actor tells, and hands on requests to stop."""

    def __init__(
        self,
        cluster: Cluster,
        names: Names,
        actor: Any,
        order: Order | None,
        shown: str,
        tell: Callable[[str], None],
    ) -> None:
        """`order`: what the actor should have been given; `shown`: what a person types for it."""
        self._cluster, self._ray, self._names, self._actor = cluster, cluster.ray, names, actor
        self._order, self._shown, self._tell = order, shown, tell
        self._asked = self._sent = 0  # requests to stop
        self._after, self._born = 0, ""
        self._heard_at = time.monotonic()
        self._pending: Any = None
        self._is_silent = False

    def follow(self, needs: str) -> int:
        """`needs`: which node the trainer waits for, if it has none."""
        before = {number: signal.signal(number, self._ask) for number in stop_signals()}
        try:
            while True:
                if self._sent < self._asked and not self._say_stop():
                    return INTERRUPTED
                told = self._look()
                if told is not None and told["state"] != GOING_ON and told["ends"]:
                    return self._ended(told)
                if told is None:
                    self._wait(f"the trainer waits for a node {needs}", WAITS_S)
                else:
                    time.sleep(LOOK_S)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, *, at_once: bool) -> None:
        """Ask it to stop, and wait for that."""
        self._actor.stop.remote(at_once=at_once)
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and self._cluster.actor(self._names.trainer) is not None:
            told = None
            with suppress(PacelineError):  # a command that follows the run has removed the actor meanwhile
                told = self._look()
            if told is not None and told["state"] != GOING_ON and told["ends"]:
                return
            time.sleep(LOOK_S)

    def _ask(self, _: int, __: FrameType | None) -> None:
        self._asked += 1

    def _say_stop(self) -> bool:
        """Hand a request to stop on. False: no actor hears it, and the run's actors were removed."""
        self._sent += 1
        if self._sent > 1 and self._is_silent:
            self._cluster.end_all(self._names)
            return False
        self._tell("the trainer is asked to stop")
        self._actor.stop.remote(at_once=self._sent > 1)
        return True

    def _look(self) -> Mapping[str, Any] | None:
        """What the actor says, once its lines were told; None if it has not answered yet.

        Raises PacelineError if it is gone for good.
        """
        exceptions = self._ray.exceptions
        if self._pending is None:
            self._pending = self._actor.look.remote(self._after)
        if not self._ray.wait([self._pending], timeout=LOOK_S)[0]:
            return None
        pending, self._pending = self._pending, None
        try:
            told: Mapping[str, Any] = self._ray.get(pending)
        except exceptions.RayActorError as error:
            self._missed(error)
            return None
        if told["born"] != self._born:
            self._meet(told)
            return None
        self._heard_at, self._is_silent, self._after = time.monotonic(), False, told["told"]
        for line in told["lines"]:
            self._tell(line if self._order is None else line.replace(self._order.path, self._shown))
        return told

    def _meet(self, told: Mapping[str, Any]) -> None:
        if self._order is not None and _settings(told["order"]) != _settings(self._order.sections):
            raise ConfigError(
                "The run is going on in this cluster with other settings than those of the run file.",
                why="Other settings take effect only when a run starts. This one is not disturbed.",
                next=f"paceline stop {self._shown}, then paceline train {self._shown}",
            )
        self._tell(f"the trainer is on {told['host']}")
        self._born, self._after = told["born"], 0
        self._sent = 0  # it was placed again, and was not asked to stop yet

    def _missed(self, error: Exception) -> None:
        """Raise PacelineError unless Ray starts the actor again."""
        if self._cluster.actor(self._names.trainer) is None:
            raise PacelineError(
                f"The run's trainer is not in the cluster any more ({' '.join(str(error).split())[-300:]}).",
                why="It was stopped or removed from elsewhere. What a checkpoint covers is safe.",
                next=f"paceline train {self._shown}",
            )
        self._wait("the trainer does not answer; if its node is gone, Ray places it on another one", 0.0)
        time.sleep(LOOK_S)

    def _wait(self, what: str, after_s: float) -> None:
        if not self._is_silent and time.monotonic() >= self._heard_at + after_s:
            self._is_silent = True
            self._tell(what)

    def _ended(self, told: Mapping[str, Any]) -> int:
        """The run's exit code. Raises the error that an actor found; a command has printed its own."""
        if told["error"]:
            what, why, advice = told["error"]
            raise RoleFailedError(what, why, advice, max(1, int(told["code"])))
        if told["state"] == Verdict.DONE.value:
            return 0
        return INTERRUPTED if told["state"] == Verdict.STOPPED.value else int(told["code"])
