"""A feature that is gone: lost, or freed by a successor that trained it; and how long one waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import FencedError, StoreError
from paceline.ledger.ledger import Ledger
from paceline.ledger.records import State
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.loader import StepLoader
from paceline.loader.settings import LoaderSettings
from paceline.testing.ledger_calls import Training, capture, consumer_of, plan_of, producer_of
from paceline.testing.light_adapters import InMemoryLightFeatureStore


@pytest.mark.parametrize("stopped_after_reporting", [False, True])
def test_what_a_successor_freed_and_archived_is_neither_read_nor_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after_reporting: bool
) -> None:
    """The ledger knows no ref any more that a replaced consumer asks for; it must learn that it is replaced
    instead of waiting for a capture that nobody makes. Real kill schedules 4919 and
    "after 2 lose/consumer/loader.after_report_lost/1/stopped" met it."""
    ledger = SQLiteLedger(tmp_path / "ledger.db")
    ledger.archive_from = 1
    capture(producer_of(ledger), 0)
    replaced = consumer_of(ledger)
    loader = StepLoader(replaced, LoaderSettings(batch_size=1))
    [entry] = ledger.read(0, 1).entries
    successor = Training(consumer_of(ledger))
    successor.step(0)
    successor.checkpoint(first_place=1)
    successor.consumer.release(InMemoryLightFeatureStore())
    successor.consumer.retire(9)
    assert ledger.find(["run0:s0"]) == {}, "archived: its ref is gone"
    if stopped_after_reporting:
        # It had reported the sample lost and was stopped while it waited for the new capture.
        monkeypatch.setattr(ledger, "report_lost", lambda *_: None)
    with pytest.raises(FencedError):
        loader.captured_again(entry.ref, "they are gone")


class PassingTime:
    """A clock that only a ledger's `wait` moves, by a quarter of a second."""

    def __init__(self, ledger: Ledger) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], object]] = {}
        self.told: list[tuple[float, str, float | None]] = []
        self._ledger = ledger
        ledger.wait = self.wait  # type: ignore[method-assign]

    def __call__(self) -> float:
        return self.now

    def wait(self, _: int, __: float) -> int:
        self.now += 0.25
        self.at.pop(self.now, lambda: None)()
        return self._ledger.lsn()

    def report(self, event: str, **fields: Any) -> None:
        self.told.append((self.now, event, fields.get("blocked_seconds")))


def loader_of(ledger: Ledger, clock: PassingTime, **settings: Any) -> StepLoader:
    loading = LoaderSettings(batch_size=1, block_size=1, **settings)
    return StepLoader(consumer_of(ledger), loading, report=clock.report, clock=clock)


def test_the_time_without_samples_is_counted_and_told_while_it_passes() -> None:
    """Exactly, by the clock: for the first samples, for the next ones, and for the stream's end."""
    ledger = SQLiteLedger()
    clock = PassingTime(ledger)
    loader = loader_of(ledger, clock)
    clock.at[2.5] = producer_of(ledger, prompts=0).end_stream
    assert loader.next_step(1) is None
    assert loader.exhausted
    assert loader.blocked_seconds == 2.5
    assert clock.told == [(at, "blocked", at) for at in (0.25, 1.25, 2.25)]
    clock.now = 50.0
    loader.first_refs(1)
    assert loader.blocked_seconds == 2.5, "what is there is not waited for"


def test_a_sample_that_nobody_captures_again_is_waited_for_until_the_deadline() -> None:
    """By the clock that was given; the time counts as blocked, and the sample stays committed."""
    ledger = SQLiteLedger()
    clock = PassingTime(ledger)
    capture(producer_of(ledger), 0)
    loader = loader_of(ledger, clock, recapture_timeout_s=3.0)
    planned = loader.next_step(1)
    assert planned is not None
    with pytest.raises(StoreError, match="not captured again"):
        loader.captured_again(planned.refs[0], "they are gone")
    loader.leave(planned)
    assert clock.now == loader.blocked_seconds == 3.25
    assert [record.sample_id for record in ledger.find(state=State.LOST).values()] == ["run0:s0"]
    assert consumer_of(ledger).plan(plan_of(1, 0)).deaths == 0, "nobody died in the step"
