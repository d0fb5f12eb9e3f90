"""The command that follows a run on a Ray cluster, with an actor of the test's own instead of a cluster's."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from paceline.cli import train_on
from paceline.config.load import given_sections, load_run_config
from paceline.errors import ConfigError, PacelineError
from paceline.placement import driver
from paceline.placement.bundles import Bundle, Node, Placement
from paceline.placement.cluster import LOCAL, Cluster, Names, connected
from paceline.placement.driver import Follower, orders_of, stop_on
from paceline.placement.keeper import GOING_ON
from paceline.placement.rules import INTERRUPTED, Verdict
from paceline.roles.child import RoleFailedError
from paceline.testing.tiny_run import TinyRun

PLACEMENT = Placement(Bundle(2), Bundle(1), beside=1, apart=2)


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class FakeRay:
    """Ray as far as a follower uses it: every answer is there at once, or never."""

    exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError)

    def __init__(self, answers: list[Any]) -> None:
        """What the actor says, look by look: an answer, an error, or None for silence."""
        self.answers = answers
        self.stops: list[bool] = []
        self.looked_after: list[int] = []
        self.known_for = 10**9  # questions for an actor by its name
        self.killed: list[str] = []
        self.util = SimpleNamespace(list_named_actors=self._names)
        self.look = SimpleNamespace(remote=self._look)
        self.stop = SimpleNamespace(remote=lambda *, at_once: self.stops.append(at_once))

    def _look(self, after: int) -> int:
        self.looked_after.append(after)
        return after

    def _names(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        return [
            {"name": name, "namespace": "paceline"}
            for name in ("r-1:trainer", "r-1:producer-1", "r-2:trainer")
        ]

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        if self.answers[0] is None:
            self.answers.pop(0)
            return [], refs
        return refs, []

    def get(self, ref: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return answer()
        return answer

    def get_actor(self, name: str, namespace: str) -> str:
        self.known_for -= 1
        if self.known_for < 0:
            raise ValueError(name)
        return name

    def kill(self, actor: str, *, no_restart: bool) -> None:
        self.killed.append(actor)


def said(*lines: str, state: str = GOING_ON, told: int = 0, born: str = "a", **more: Any) -> dict[str, Any]:
    """What the trainer's actor says at a look."""
    rest = {"host": "node-a", "order": {}, "ends": state != GOING_ON, "code": 0, "error": None}
    return {"born": born, "lines": list(lines), "told": told, "state": state, **rest, **more}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.placement.driver.LOOK_S", 0.0)


def follow(ray: FakeRay, lines: list[str] | None = None, order: Any = None) -> int:
    heard = [] if lines is None else lines
    cluster = Cluster(ray, None)
    return Follower(cluster, Names("r-1"), ray, order, "run.yaml --on auto", heard.append).follow(
        "with 2 CPUs"
    )


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (said(state=Verdict.DONE.value), 0),
        (said(state=Verdict.STOPPED.value, code=130), INTERRUPTED),
        (said(state=Verdict.FAILED.value, code=6), 6),
    ],
)
def test_the_exit_code_is_that_of_the_run(end: dict[str, Any], code: int) -> None:
    assert follow(FakeRay([said(), end])) == code


def test_every_line_is_told_once_also_when_the_trainer_was_placed_again() -> None:
    lines: list[str] = []
    end = said(state=Verdict.DONE.value, told=1, born="b")
    first, second = said("one", "two", told=2), said("three", told=1, born="b")
    ray = FakeRay([said(), first, None, said(born="b", told=9), second, end])
    assert follow(ray, lines) == 0
    assert [line for line in lines if " " not in line] == ["one", "two", "three"]
    assert ray.looked_after == [0, 0, 2, 0, 1]


def test_the_run_is_followed_until_its_producers_have_ended() -> None:
    """Their resources are free again when the command returns."""
    ray = FakeRay([said(), said(state=Verdict.DONE.value, ends=False), said(state=Verdict.DONE.value)])
    assert follow(ray) == 0
    assert ray.answers == []


def test_what_an_actor_found_is_raised_with_its_advice() -> None:
    error = ["It broke.", "Nothing was changed.", "mend it."]
    with pytest.raises(RoleFailedError, match="It broke") as caught:
        follow(FakeRay([said(), said(state=Verdict.FAILED.value, code=-9, error=error)]))
    assert (caught.value.next, caught.value.exit_code) == ("mend it.", 1)


def test_a_trainer_that_is_placed_again_is_waited_for_and_one_that_was_removed_is_not() -> None:
    lines: list[str] = []
    assert follow(FakeRay([said(), RayActorError(), said(state=Verdict.DONE.value)]), lines) == 0
    assert any("does not answer" in line for line in lines)
    ray = FakeRay([said(), RayActorError()])
    ray.known_for = 0
    with pytest.raises(PacelineError, match="not in the cluster any more"):
        follow(ray)


def test_a_request_to_stop_reaches_the_trainer_and_the_one_that_follows_it() -> None:
    def interrupted(answer: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        def answered() -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGINT)
            return answer

        return answered

    end = said(state=Verdict.STOPPED.value, born="b")
    ray = FakeRay([said(), interrupted(said()), said(), said(born="b"), said(born="b"), end])
    assert follow(ray) == INTERRUPTED
    assert ray.stops == [False, False], "also the trainer that was placed again"
    again = FakeRay([said(), interrupted(said()), interrupted(said()), said(), said(state="stopped")])
    assert follow(again) == INTERRUPTED
    assert again.stops == [False, True]


def test_a_stop_from_elsewhere_waits_for_the_end_of_the_run_or_of_its_actor() -> None:
    """The command that follows the run removes the actor once it knows how the run ended."""
    for last in (said(state=Verdict.STOPPED.value), RayActorError()):
        ray = FakeRay([said(), said(), last])
        follower = Follower(Cluster(ray, None), Names("r-1"), ray, None, "run.yaml --on auto", print)
        ray.known_for = 3
        follower.stop(at_once=True)
        assert (ray.stops, ray.answers) == ([True], [])


def test_a_run_that_nobody_hears_is_removed_at_the_second_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node may never come."""
    monkeypatch.setattr("paceline.placement.driver.WAITS_S", 0.0)
    ray = FakeRay([None] * 9)

    def wait(refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        os.kill(os.getpid(), signal.SIGINT)
        return [], refs

    ray.wait = wait  # type: ignore[method-assign]
    assert follow(ray) == INTERRUPTED
    assert ray.killed == ["r-1:producer-1", "r-1:trainer"], "and no actor of another run"


def test_a_run_with_other_settings_is_not_followed(tmp_path: Path) -> None:
    config = load_run_config(TinyRun(tmp_path, tmp_path).run_file)
    trainer, _ = orders_of(config, PLACEMENT, Names.of(config))
    with pytest.raises(ConfigError, match="other settings") as caught:
        follow(FakeRay([said(order={"run": {}})]), order=trainer)
    assert "paceline stop run.yaml --on auto" in caught.value.next
    lines: list[str] = []
    same = {"order": trainer.sections}
    ray = FakeRay([said(**same), said(f"paceline train {trainer.path}", **same), said(state="done", **same)])
    assert follow(ray, lines, trainer) == 0
    assert "paceline train run.yaml --on auto" in lines, "the command that a person types"


def test_a_run_is_followed_when_its_cluster_has_lost_nodes(tmp_path: Path) -> None:
    """With one node left, another trainer would have all producers beside it; this one goes on as it is."""
    config = load_run_config(TinyRun(tmp_path, tmp_path, machine={"producers": 3}).run_file)
    before, _ = orders_of(config, PLACEMENT, Names.of(config))
    now, _ = orders_of(config, Placement(Bundle(4), Bundle(1), beside=3, apart=0), Names.of(config))
    assert before.sections != now.sections
    known = {"order": before.sections}
    assert follow(FakeRay([said(**known), said(state="done", **known)]), order=now) == 0


def test_a_run_that_is_going_on_is_followed_before_anything_is_asked_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have no room for another trainer, or a node that could take none, and needs neither."""
    run_file = TinyRun(tmp_path, tmp_path, machine={"producers": 3}).run_file
    config = load_run_config(run_file)
    known = {"order": orders_of(config, PLACEMENT, Names.of(config))[0].sections}
    ray = FakeRay([said(**known), said("one", told=1, **known), said(state="done", **known)])
    ray.nodes = list  # type: ignore[attr-defined]
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: ray)
    monkeypatch.setattr("paceline.placement.driver.connected", lambda _: nullcontext(Cluster(ray, None)))
    lines: list[str] = []
    assert driver.train_on(run_file, "auto", lines.append) == 0
    assert "one" in lines
    unknown = FakeRay([])
    unknown.known_for = 0
    monkeypatch.setattr(ray, "get_actor", unknown.get_actor)
    with pytest.raises(ConfigError, match="none has them"):
        driver.train_on(run_file, "auto", lines.append)


def test_a_run_that_another_command_starts_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the nodes takes a while: the second command follows the trainer of the first."""
    config = load_run_config(TinyRun(tmp_path, tmp_path).run_file)
    ray = FakeRay([])
    ray.known_for = 0
    first = SimpleNamespace(remote=lambda *_: "the first one's trainer")
    actors = SimpleNamespace(TrainerActor=None, actor_of=lambda *_: first)
    cluster, ended = Cluster(ray, actors), []
    monkeypatch.setattr(driver, "placement_of", lambda *_: PLACEMENT)
    monkeypatch.setattr(driver, "refuse_nodes", lambda *_: None)
    monkeypatch.setattr(cluster, "nodes", list)
    monkeypatch.setattr(cluster, "examined", lambda *_: setattr(ray, "known_for", 9))
    monkeypatch.setattr(cluster, "end_all", ended.append)
    placed = driver._placed(cluster, config, Names("r-1"), lambda _: None)
    assert (placed[0], ended) == ("the first one's trainer", [])
    monkeypatch.setattr(cluster, "examined", lambda *_: setattr(ray, "known_for", 0))
    driver._placed(cluster, config, Names("r-1"), lambda _: None)
    assert ended, "what is left of a run without a trainer goes"


def test_every_actor_has_its_own_run_file_and_name(tmp_path: Path) -> None:
    config = load_run_config(TinyRun(tmp_path, tmp_path, machine={"producers": 3}).run_file)
    names = Names.of(config)
    trainer, producers = orders_of(config, PLACEMENT, names)
    assert list(producers) == [names.producer(1), names.producer(2)]
    assert len({trainer.path, *(order.path for order in producers.values())}) == 3
    assert [order.options for order in producers.values()] == [("--join",)] * 2
    assert trainer.config.machine.producers == 1
    assert given_sections(trainer.config)["run"] == given_sections(config)["run"]
    other = load_run_config(TinyRun(tmp_path / "other", tmp_path).run_file)
    assert Names.of(other).run != names.run


def test_a_lost_connection_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = PacelineError("lost")
    for error in (RayError(), ConnectionError()):
        with pytest.raises(PacelineError, match="lost"), Cluster(FakeRay([]), None).losing(lost):
            raise error
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="Ray cannot be imported") as caught, connected("auto"):
        pass
    assert "paceline[ray]" in caught.value.next


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        asks.append(1)
        raise ConnectionError("no answer")

    asks: list[int] = []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    told = "The Ray cluster ray://a:1 cannot be reached"
    with pytest.raises(ConfigError, match=told) as caught, connected("ray://a:1"):
        pass
    assert "docs/ray.md" in caught.value.next
    assert len(asks) == 1, "it may be another address"


@pytest.mark.parametrize(("failures", "asked"), [(2, 3), (9, 3)])
def test_a_head_that_is_slow_to_serve_a_client_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, failures: int, asked: int
) -> None:
    """It gives up the server that it has started. An address without a head is not asked again."""
    asks: list[str] = []

    def init(address: str, **_: Any) -> None:
        asks.append(address)
        if len(asks) <= failures:
            raise ConnectionAbortedError("Proxy failed to Connect to backend!")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: None))
    monkeypatch.setitem(sys.modules, "paceline.placement.actors", SimpleNamespace())
    with suppress(ConfigError) if failures >= asked else nullcontext(), connected("ray://a:1"):
        assert failures < asked
    assert len(asks) == asked


def test_a_node_that_dies_while_it_is_looked_at_hides_nothing_of_the_others(tmp_path: Path) -> None:
    """The run's folder is marked by the first node that can, and that node removes the mark."""

    class Looked(Cluster):
        def _on(self, node: Node, work: Any) -> Any:
            return SimpleNamespace(remote=lambda *_, **more: (node.id, work, more.get("marks")))

        def _answer(self, asked: Any) -> dict[str, Any]:
            asks.append(asked)
            return {"problem": "it died"} if asked[0] == "a" else {"lacks": [], "has": []}

    asks: list[Any] = []
    looked = Looked(None, SimpleNamespace(found_here="look", unmark="unmark"))
    nodes = [Node(name, name, cpus=2.0) for name in "abc"]
    run = TinyRun(tmp_path, tmp_path / "model")
    found = looked.examined(load_run_config(run.run_file), nodes)
    assert [node.problem for node in found] == ["it died", "", ""]
    assert asks == [("a", "look", True), ("b", "look", True), ("c", "look", False), ("b", "unmark", None)]


def test_a_local_cluster_has_nothing_to_stop(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ends with the command that started it"):
        stop_on(tmp_path / "run.yaml", LOCAL, print, at_once=False)


# -- the child that is connected ------------------------------------------------------------


def test_the_commands_exit_code_is_the_childs() -> None:
    with pytest.raises(typer.Exit) as caught:
        train_on._in_a_child(lambda: 6, "train run.yaml", "auto")
    assert caught.value.exit_code == 6
    train_on._in_a_child(lambda: 0, "train run.yaml", "auto")


def test_a_child_that_ray_ends_is_told_with_what_to_do() -> None:
    """Ray's own exit code may be any of ours."""
    with pytest.raises(PacelineError, match="The connection to the Ray cluster auto was lost") as caught:
        train_on._in_a_child(lambda: os._exit(1), "train run.yaml", "auto")
    assert "paceline train run.yaml --on auto" in caught.value.next


def test_a_signal_reaches_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """However quick the child is: before the command can hand signals on, one ends the command."""
    parent, fork = os.getpid(), os.fork
    reads, writes = os.pipe()
    with os.fdopen(reads, "rb") as heard, os.fdopen(writes, "wb", buffering=0) as sent:

        def fork_and_look() -> int:
            if child := fork():
                stat = Path(f"/proc/{child}/stat")
                while stat.read_text().rpartition(")")[2].split()[0] not in "SZ":
                    pass  # until it waits for something, or has ended
                assert select.select([heard], [], [], 0)[0] == [], "its work has begun"
            return child

        def work() -> int:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            sent.write(b".")
            os.kill(parent, signal.SIGTERM)
            while True:
                signal.pause()

        monkeypatch.setattr(os, "fork", fork_and_look)
        with pytest.raises(typer.Exit) as caught:
            train_on._in_a_child(work, "train run.yaml", "auto")
    assert caught.value.exit_code == INTERRUPTED
