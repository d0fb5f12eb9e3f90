"""Prompts fail one by one; a fault of the engine or the machine fails no prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from paceline.capture.producer import Producer
from paceline.errors import ConfigError, EngineError
from paceline.ledger.isolation import DEATHS_BEFORE_ISOLATION
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import PromptCounts
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.light_adapters import InMemoryLightFeatureStore, LightEngine
from paceline.testing.simulated_run import Shape, simulated_producer


class Run:
    """A ledger, features, and an engine whose failures are set; a producer for as often as it is asked."""

    def __init__(self, prompts: int, group: int) -> None:
        self.shape = Shape(prompts=prompts, group=group)
        self.ledger, self.features = SQLiteLedger(), InMemoryLightFeatureStore()
        self.fails: Callable[[Sequence[int]], bool] = lambda _: False
        self.message = "index out of range"
        self.probe_fails = False
        self.engine = Engine(self)

    def producer(self) -> Producer:
        return simulated_producer(
            self.shape, "0", self.ledger, self.features, self.engine, lambda *_, **__: None
        )

    @property
    def committed(self) -> list[int]:
        return [entry.place for entry in self.ledger.read(0, self.shape.prompts).entries]

    @property
    def failed(self) -> list[int]:
        return list(self.ledger.failed())


class Engine(LightEngine):
    def __init__(self, run: Run) -> None:
        def refuse(sample_ids: Sequence[str]) -> None:
            if run.fails([int(i.rpartition(":")[2]) for i in sample_ids]):
                raise RuntimeError(run.message)

        super().__init__(refuse)
        self._run = run

    def probe(self) -> None:
        if self._run.probe_fails:
            raise EngineError("The engine is broken.", next="mend it.")


def any_of(*bad: int) -> Callable[[Sequence[int]], bool]:
    return lambda group: any(n in bad for n in group)


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("bad", [[0], [6], [0, 1, 2], [2, 6]])
def test_a_prompt_fails_alone_in_groups_of_every_size(group: int, bad: list[int]) -> None:
    """Also the very first prompt, a whole group of them, and the last odd one."""
    run = Run(7, group)
    run.fails = any_of(*bad)
    run.producer().run()
    assert run.failed == bad
    assert run.committed == [n for n in range(7) if n not in bad]
    assert run.ledger.snapshot().closed


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("broken_from", [0, 3, 6])
def test_a_broken_engine_fails_no_prompt(group: int, broken_from: int) -> None:
    """Though its probe passes: from the first prompt on, in the middle, or at the last odd one."""
    run = Run(7, group)
    run.producer().run(max_rounds=broken_from // group)
    captured = len(run.engine.captured)
    run.fails = lambda _: True
    for _ in range(3):
        with pytest.raises(EngineError, match="index out of range"):
            run.producer().run()
    assert run.failed == []
    assert run.ledger.snapshot().prompts.leased == 0
    assert len(run.engine.captured) == captured
    run.fails = lambda _: False
    run.producer().run()
    assert run.committed == list(range(7))


@pytest.mark.parametrize("group", [1, 3])
def test_a_probe_that_fails_is_what_is_reported(group: int) -> None:
    """Also of one prompt alone."""
    run = Run(4, group)
    run.producer().run(max_rounds=1)
    run.fails, run.probe_fails = (lambda _: True), True
    with pytest.raises(EngineError, match="The engine is broken"):
        run.producer().run()
    assert run.failed == []


@pytest.mark.parametrize("group", [1, 3])
def test_want_of_memory_is_never_a_prompts_fault(group: int) -> None:
    """The group is tried once more, and then the producer stops with advice."""
    run = Run(7, group)
    run.producer().run(max_rounds=1)
    run.fails, run.message = any_of(group), "[enforce fail] DefaultCPUAllocator: can't allocate memory"
    for _ in range(4):
        with pytest.raises(EngineError, match="memory is too small"):
            run.producer().run()
    assert run.failed == []
    run.fails = lambda _: False
    run.producer().run()
    assert run.committed == list(range(7))


def test_only_so_many_prompts_in_a_row_may_fail() -> None:
    """One good prompt among them begins the count anew; past the limit the producer stops with advice."""
    run = Run(60, 1)
    run.fails = lambda group: any(10 <= n < 20 or 21 <= n < 50 for n in group)
    with pytest.raises(EngineError, match=r"17 prompts in a row fail.*failures_in_a_row_max"):
        run.producer().run()
    assert run.committed == [*range(10), 20]
    assert run.ledger.snapshot().prompts.leased == 0
    assert not set(run.failed) & {n for n in range(60) if not 10 <= n < 50}


def test_no_prompt_fails_before_something_was_captured() -> None:
    """So that settings may still change; afterwards it is, with its reason."""
    run = Run(9, 3)
    run.fails = any_of(0, 1, 2)
    run.producer().run(max_rounds=1)
    assert run.failed == []
    assert run.ledger.snapshot().prompts == PromptCounts(pending=9)
    run.producer().run()
    assert run.failed == [0, 1, 2]


@pytest.mark.parametrize("group", [1, 3])
def test_a_run_of_which_every_prompt_fails_ends_with_an_error(group: int) -> None:
    """Not with an empty stream, which no consumer could train on."""
    run = Run(5, group)
    run.fails = lambda _: True
    with pytest.raises(EngineError, match=r"None of the 5 prompts can be captured.*index out of range"):
        run.producer().run()
    assert not run.ledger.snapshot().closed
    assert run.failed == []


def test_prompts_that_cannot_be_encoded_end_a_run_of_nothing_else_with_their_reasons() -> None:
    """Each has its own."""
    run = Run(3, 2)

    class Tasks(Shape):
        def tasks(self) -> Any:
            return ["", *super().tasks()[1:]]

    run.shape = Tasks(prompts=3, group=2)
    run.producer().run()
    assert run.ledger.failed() == {0: "0: 0 token ids, not all within the target's 256"}
    assert run.committed == [1, 2]


def test_members_that_are_not_wanted_fail_none_that_are() -> None:
    """A lost sample is captured with its group; if another member fails now, which was captured before, the
    engine or the machine is at fault."""
    run = Run(3, 3)
    run.producer().run()
    run.features.free([("light:0", 0)])
    run.fails = any_of(2)
    for _ in range(4):
        with pytest.raises(EngineError, match="none of these prompts is to blame"):
            run.producer().run()
    assert run.failed == []
    assert run.ledger.snapshot().quarantined == 0
    run.fails = lambda _: False
    run.producer().run()
    assert sorted(sample_id for sample_id, _ in run.features.written()) == ["light:0", "light:1", "light:2"]


def test_an_engine_that_dies_of_everything_is_not_proof_against_one() -> None:
    """Before a trial of prompts whose producers died, one that was captured before is captured again."""
    run = Run(4, 1)
    run.producer().run(max_rounds=1)
    for _ in range(DEATHS_BEFORE_ISOLATION):
        dies = ProducerSession(run.ledger, "light")
        dies.acquire()
        dies.lease(1)
    run.fails = lambda _: True
    with pytest.raises(EngineError, match=r"The engine fails on 1, and on 0 too, which was captured before"):
        run.producer().run()
    assert run.failed == []


def test_another_rendering_of_the_prompts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next start by the first group, and when a lost sample would be captured of other token ids."""
    run = Run(6, 2)

    class Told(Shape):
        def tasks(self) -> Any:
            return [f"question {n}" for n in range(self.prompts)]

    run.shape = Told(prompts=6, group=2)
    run.producer().run(max_rounds=2)

    def dated(first: int) -> Callable[[str], tuple[int, ...]]:
        return lambda text: (7, *text.encode()) if int(text[-1]) >= first else tuple(text.encode())

    monkeypatch.setattr(run.engine, "encode", dated(0))
    with pytest.raises(ConfigError, match="of the first group now have other token ids"):
        run.producer().run()
    monkeypatch.setattr(run.engine, "encode", dated(2))
    run.producer().run(max_rounds=0)
    run.features.free([("light:3", 0)])
    with pytest.raises(ConfigError, match="of the group of 3 now have other token ids"):
        run.producer().run()
    assert run.committed == [0, 1, 2, 3]
