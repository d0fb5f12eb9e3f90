"""A producer's actor as the trainer's sees it, with a Ray of the test's own."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from paceline.placement.bundles import Bundle, Placement
from paceline.placement.keeper import Order

PLACEMENT = Placement(Bundle(2), Bundle(1), beside=1, apart=1)
ORDER = Order("producer 1", "produce", {}, "run.yaml", ".", ("--join",))


class RayError(Exception):
    pass


class FakeRay(ModuleType):
    """Its actor answers nothing, and is known by its name or is not."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.is_known = True
        call = SimpleNamespace(remote=lambda *_, **__: "asked")
        actor = SimpleNamespace(look=call, stop=call)
        made = SimpleNamespace(remote=lambda *_: actor)
        self.remote = lambda _: SimpleNamespace(options=lambda **_: made)
        self.wait = lambda asked, timeout: (asked, [])

    def get(self, _: object) -> Any:
        raise RayError("its node has gone")

    def get_actor(self, name: str, namespace: str) -> object:
        if not self.is_known:
            raise ValueError(f"{namespace} has no {name}")
        return self


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    exceptions, found = ModuleType("ray.exceptions"), FakeRay()
    exceptions.__dict__["RayError"] = RayError
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    monkeypatch.delitem(sys.modules, "paceline.placement.actors", raising=False)
    return found


def test_a_producer_that_ray_starts_no_more_is_given_up_and_told_once(ray: FakeRay) -> None:
    """Such as one that could not begin on a node which came later; it was asked for ever, once a second."""
    actors = import_module("paceline.placement.actors")
    member = actors.Member("r:producer-1", ORDER, PLACEMENT)
    assert "does not answer" in member.look()[0]
    assert not member.look(), "it is told once"
    assert not member.is_over
    ray.is_known = False
    [line] = member.look()
    assert "the run goes on without it" in line
    assert member.is_over
    assert not member.look()
    del sys.modules["paceline.placement.actors"]  # it has that Ray
