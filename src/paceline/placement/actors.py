"""The actors of a run on a Ray cluster, and the task that looks at a node. The modules beside it decide.

Actors are detached: they outlive the command that asked for them, and Ray places them on another node if
theirs dies. Every actor is found by its name, so a second command finds what the first one started.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from paceline.placement.bundles import Bundle, Placement, on_gpus
from paceline.placement.keeper import GOING_ON, Keeper, Order

NAMESPACE = "paceline"
LOOK_S = 1.0
WAITS_S = 20.0  # until it is told that an actor has no node yet
STOP_S = 30.0  # for the producers, which end at the group that they capture
COLLECT_S = 60.0  # for the command to hear how the run ended


def found_here(
    folder: str, paths: Sequence[str], variables: Sequence[str], mark: str, *, marks: bool
) -> dict[str, Any]:
    """What a node has. `mark`: a file of the run's folder, which the first node makes (`marks`)."""
    from paceline import __version__

    found: dict[str, Any] = {
        "version": __version__,
        "has_token": os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
        "host": socket.gethostname(),
    }
    lacks = [f"{name} in its environment" for name in variables if not os.environ.get(name)]
    if not Path(folder).is_dir():
        return {**found, "lacks": [*lacks, f"the folder {folder}, where the paths of the run file begin"]}
    os.chdir(folder)
    if mark:
        if marks:
            Path(mark).parent.mkdir(parents=True, exist_ok=True)
            Path(mark).touch()
        elif not Path(mark).exists():
            lacks.append(f"the run's folder {Path(mark).parent}, which all nodes must mount")
    return {**found, "lacks": lacks, "has": [path for path in paths if Path(path).exists()]}


def unmark(folder: str, mark: str) -> None:
    """Remove the mark, and the run's folder if nothing else is in it."""
    os.chdir(folder)
    Path(mark).unlink(missing_ok=True)
    with suppress(OSError):
        Path(mark).parent.rmdir()


class KeptActor:
    """A command of the run, kept going on this node."""

    def __init__(self, order: Order, placement: Placement) -> None:
        os.chdir(order.folder)
        gpus = [int(number) for number in ray.get_gpu_ids() if str(number).isdecimal()]
        sections = on_gpus(order.sections, gpus, placement, trains=order.trains)
        self._keeper = Keeper(replace(order, sections=sections))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self._keeper.run()

    def look(self, after: int) -> dict[str, Any]:
        return self._keeper.look(after)

    def stop(self, *, at_once: bool = False) -> None:
        self._keeper.stop(at_once=at_once)


class TrainerActor(KeptActor):
    """The trainer's command, and the actors of the producers that are placed apart."""

    def __init__(self, order: Order, placement: Placement, producers: Mapping[str, Order]) -> None:
        """`producers`: orders, by the actors' names."""
        self._crew = Crew(producers, placement)
        self._given = order.sections
        super().__init__(order, placement)

    def _run(self) -> None:
        watch = threading.Thread(target=self._watch_crew, daemon=True)
        watch.start()
        self._keeper.run()
        watch.join()
        time.sleep(COLLECT_S)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _watch_crew(self) -> None:
        keeper = self._keeper
        try:
            while not keeper.is_over and not keeper.takes_producers():
                time.sleep(LOOK_S)
            while not keeper.is_over:
                with suppress(RayError):
                    for line in self._crew.look():
                        keeper.tell(line)
                time.sleep(LOOK_S)
        finally:
            self._crew.end()

    def look(self, after: int) -> dict[str, Any]:
        return {**super().look(after), "order": self._given, "ends": self._crew.has_ended}

    def stop(self, *, at_once: bool = False) -> None:
        super().stop(at_once=at_once)
        self._crew.stop(at_once=at_once)


class Crew:
    """The producers that are placed apart, as the trainer's actor sees them."""

    def __init__(self, orders: Mapping[str, Order], placement: Placement) -> None:
        self._orders, self._placement = orders, placement
        self._members: dict[str, Member] = {}
        self.has_ended = False

    def look(self) -> list[str]:
        """Start what is not there, and return what they have told since the last look."""
        lines = []
        for name, order in self._orders.items():
            if name not in self._members:
                self._members[name] = Member(name, order, self._placement)
            lines += self._members[name].look()
        return lines

    def stop(self, *, at_once: bool) -> None:
        for member in list(self._members.values()):
            member.stop(at_once=at_once)

    def end(self) -> None:
        """Stop them all, and free their resources; also those of a trainer whose node died before."""
        try:
            for name, order in self._orders.items():
                if name not in self._members and is_there(name):
                    self._members[name] = Member(name, order, self._placement)
            self.stop(at_once=False)
            deadline = time.monotonic() + STOP_S
            while time.monotonic() < deadline and not all(m.is_over for m in self._members.values()):
                for member in self._members.values():
                    member.look()
                time.sleep(0.2)
            for member in self._members.values():
                member.end()
        finally:
            self.has_ended = True


class Member:
    """A producer's actor, asked without waiting for the answer: its node may be gone."""

    def __init__(self, name: str, order: Order, placement: Placement) -> None:
        self._name, self._what = name, order.what
        self._bundle = placement.producer
        self._actor = actor_of(KeptActor, name, placement.producer).remote(order, placement)
        self._after, self._born = 0, ""
        self._asked: Any = None
        self._asked_at = 0.0
        self._waits = False
        self.is_over = False

    def look(self) -> list[str]:
        if self.is_over:
            return []
        if self._asked is None:
            self._asked, self._asked_at = self._actor.look.remote(self._after), time.monotonic()
        if not ray.wait([self._asked], timeout=0)[0]:
            if self._waits or time.monotonic() < self._asked_at + WAITS_S:
                return []
            self._waits = True
            return [f"{self._what} waits for a node with {self._bundle}"]
        asked, self._asked = self._asked, None
        try:
            told = ray.get(asked)
        except RayError as error:
            if not is_there(self._name):  # it failed before it began, or was removed
                self.is_over = True
                why = " ".join(str(error).split())[-300:]
                return [f"{self._what}: Ray starts it no more ({why}); the run goes on without it"]
            if self._waits:
                return []
            self._waits = True
            return [f"{self._what} does not answer; Ray places it on another node if its own is gone"]
        return self._heard(told)

    def _heard(self, told: Mapping[str, Any]) -> list[str]:
        lines = []
        if told["born"] != self._born:
            self._born, self._after, self._waits = told["born"], 0, False
            lines.append(f"{self._what} is on {told['host']}")
        else:
            self._after = told["told"]
            lines += [
                line if line.startswith(self._what) else f"{self._what}: {line}" for line in told["lines"]
            ]
            if told["state"] != GOING_ON:
                self.is_over = True
                lines.append(f"{self._what}: {told['state']}{_reason(told)}")
                self.end()
        return lines

    def stop(self, *, at_once: bool) -> None:
        with suppress(RayError):
            self._actor.stop.remote(at_once=at_once)

    def end(self) -> None:
        with suppress(RayError):
            ray.kill(self._actor, no_restart=True)


def _reason(told: Mapping[str, Any]) -> str:
    return f"; {' '.join(told['error'])}" if told["error"] else ""


def is_there(name: str) -> bool:
    """Whether the cluster has an actor of this name."""
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def actor_of(kind: type, name: str, bundle: Bundle) -> Any:
    """What makes the actor, or finds the one of this name."""
    return ray.remote(kind).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=8,
        num_cpus=bundle.cpus,
        num_gpus=bundle.gpus,
        scheduling_strategy="SPREAD",
    )
