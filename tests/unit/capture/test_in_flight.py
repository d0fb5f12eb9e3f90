"""Several groups are captured at the same time, as many as are allowed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from paceline.capture.backpressure import Backpressure, Watermarks
from paceline.capture.encoding import EncodedPrompt
from paceline.capture.groups import CaptureGroup
from paceline.capture.in_flight import CaptureInFlight, CapturesInFlight
from paceline.capture.producer import Producer
from paceline.capture.settings import CaptureSettings
from paceline.data.source import PromptList
from paceline.engines.engine import Captured, CaptureRequest
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.target.facts import TargetFacts
from paceline.testing.light_adapters import LIGHT_FEATURES, InMemoryLightFeatureStore, LightEngine
from paceline.types import Feature


def capture(number: int) -> CaptureInFlight:
    prompt = EncodedPrompt(number, str(number), (1,))
    return CaptureInFlight(CaptureGroup((prompt,), (prompt,), ""), {}, 0.0)


def test_one_alone_is_captured_on_the_callers_thread() -> None:
    """At once, so that a simulation decides when."""
    threads: list[threading.Thread] = []

    def answer(_: Sequence[EncodedPrompt]) -> Any:
        threads.append(threading.current_thread())
        return ["done"]

    captures = CapturesInFlight(answer, 1)
    captures.begin(capture(0))
    assert not captures.has_room
    assert captures.first_done().future.result() == ["done"]
    assert threads == [threading.current_thread()]
    assert captures.has_room


def test_several_are_in_the_engine_together_and_end_in_any_order() -> None:
    """The first ends last, because the others were waited for."""
    together, first_may_end = threading.Barrier(3), threading.Event()

    def answer(members: Sequence[EncodedPrompt]) -> Any:
        together.wait(timeout=60)
        if members[0].ordinal == 0:
            assert first_may_end.wait(timeout=60)
        return [members[0].ordinal]

    captures = CapturesInFlight(answer, 3)
    for number in range(3):
        assert captures.has_room
        captures.begin(capture(number))
    ended = [captures.first_done() for _ in range(2)]
    assert sorted(one.group.wanted[0].ordinal for one in ended) == [1, 2]
    first_may_end.set()
    assert captures.first_done().future.result() == [0]
    assert captures.close() == []


@pytest.mark.parametrize("most", [1, 2])
def test_what_the_engine_raises_is_raised_where_the_group_ends(most: int) -> None:
    """And a group that no caller waited for is given back when it is through."""

    def answer(_: Sequence[EncodedPrompt]) -> Any:
        raise ValueError("index out of range")

    captures = CapturesInFlight(answer, most)
    captures.begin(capture(0))
    with pytest.raises(ValueError, match="index out of range"):
        captures.first_done().future.result()
    captures.begin(capture(1))
    [left] = captures.close()
    assert left.group.wanted[0].ordinal == 1
    assert isinstance(left.future.exception(), ValueError)


class Busy(LightEngine):
    """Works on three groups at once: none ends before the third has come, and the first ends last."""

    def __init__(self, groups: int, fails: int = -1) -> None:
        super().__init__()
        self.together, self.others_ended = threading.Barrier(groups), threading.Event()
        self.most, self.fails = groups, fails
        self.ended: list[int] = []

    @property
    def facts(self) -> TargetFacts:
        return replace(super().facts, groups_in_flight_max=self.most)

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        first = int(group[0].sample_id.rpartition(":")[2])
        if len(group) > 1 and first < 2 * self.most:  # the groups that begin together
            self.together.wait(timeout=60)
            if first == 0:
                assert self.others_ended.wait(timeout=60)
        self.ended.append(first)
        if len(self.ended) >= self.most - 1:
            self.others_ended.set()
        if any(request.sample_id.endswith(f":{self.fails}") for request in group):
            raise ValueError("index out of range")
        return super().capture(group, features)


def producer(engine: Busy, ledger: SQLiteLedger, prompts: int) -> Producer:
    session, features = ProducerSession(ledger, "run", attempt_max=1), InMemoryLightFeatureStore()
    settings = CaptureSettings(group_size=2, max_answer_tokens=4, features=LIGHT_FEATURES, groups_in_flight=3)
    pressure = Backpressure(features, session, Watermarks(1 << 20, 2 * 256, group_samples=2))
    given = PromptList([{"prompt_ids": [n + 1]} for n in range(prompts)])
    return Producer(session, engine, features, given, settings, pressure)


def test_groups_that_end_in_another_order_are_committed_in_the_prompts_places() -> None:
    """Three at once, of which the first ends last; then the rest."""
    engine, ledger = Busy(3), SQLiteLedger()
    assert producer(engine, ledger, 8).run() == 8
    assert engine.ended.index(0) >= 2
    entries = ledger.read(0, 9).entries
    assert [entry.sample_id for entry in entries] == [f"run:{n}" for n in range(8)]
    assert ledger.snapshot().closed


def test_a_prompt_that_fails_among_groups_in_flight_is_found_alone() -> None:
    """The other groups are committed, and the stream ends."""
    engine, ledger = Busy(3, fails=3), SQLiteLedger()
    assert producer(engine, ledger, 6).run() == 5
    assert [entry.place for entry in ledger.read(0, 9).entries] == [0, 1, 2, 4, 5]
    assert list(ledger.failed(0, 9)) == [3]
    assert ledger.snapshot().closed


def test_a_producer_that_stops_ends_what_is_in_flight_and_holds_no_lease() -> None:
    """What the engine was through with is committed; nothing counts as a death."""
    engine, ledger = Busy(2), SQLiteLedger()
    one = producer(engine, ledger, 8)
    assert one.run(max_rounds=2) == 4
    prompts = ledger.snapshot().prompts
    assert (prompts.leased, prompts.pending) == (0, 4)
