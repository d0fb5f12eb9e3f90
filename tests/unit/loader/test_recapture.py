"""A feature that is gone: lost, or freed by a successor that trained it; and how long one waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline import InMemoryMetadataStore
from paceline.errors import FencedError, StoreError
from paceline.ledger.channel import CommittedRefLog
from paceline.ledger.controller import DataFlowController
from paceline.ledger.records import CheckpointRecord, StepPlan, chain_of
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.loader.loader import LoaderSettings, StepLoader
from paceline.testing.samples import sample_ref


@pytest.mark.parametrize("stopped_after_reporting", [False, True])
def test_what_a_successor_freed_and_folded_is_neither_read_nor_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after_reporting: bool
) -> None:
    """The ledger answers a replaced consumer with another ref, the folded one; it must learn that it is
    replaced instead of trying that one, or waiting for a capture that nobody makes. Real kill schedules
    4919 and "after 2 lose/consumer/loader.after_report_lost/1/stopped" met it."""
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    store.fold_from = 1
    store.add_tasks(["task-0"])
    store.lease_tasks("w", 1)
    store.commit_samples([sample_ref(0)])
    replaced, successor = (DataFlowController("run0", metadata_store=store) for _ in range(2))
    replaced.take_role("consumer")
    loader = StepLoader(replaced, LoaderSettings(batch_size=1))
    ref = store.get_committed("run0:s0")
    assert ref is not None
    fence = successor.take_role("consumer")
    plan = StepPlan(1, ("run0:s0",), 1)
    successor.begin_step(plan)
    successor.ack_step(1, 0, ["run0:s0"])
    successor.write_ack()
    store.record_checkpoint(CheckpointRecord(1, "c", "d", 1, chain_of("", [plan])), fence=fence)
    store.record_released(["run0:s0"], fence=fence)
    store.compact(fence=fence)
    assert store.get_committed("run0:s0") != ref, "folded: its keys and specs are gone"
    if stopped_after_reporting:
        # It had reported the sample lost and was stopped while it waited for the new capture.
        monkeypatch.setattr(store, "report_lost", lambda *_, **__: None)
    with pytest.raises(FencedError):
        loader.recapture.wait_for(ref, "they are gone")


class PassingTime:
    """A clock that only a ledger's `wait` moves, by a quarter of a second."""

    def __init__(self, store: InMemoryMetadataStore) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], object]] = {}
        self.told: list[tuple[float, str, float | None]] = []
        self._store = store
        store.wait = self.wait  # type: ignore[method-assign]

    def __call__(self) -> float:
        return self.now

    def wait(self, _: int, __: float) -> int:
        self.now += 0.25
        self.at.pop(self.now, lambda: None)()
        return self._store.lsn()

    def report(self, event: str, **fields: Any) -> None:
        self.told.append((self.now, event, fields.get("blocked_seconds")))


def loader_of(store: InMemoryMetadataStore, clock: PassingTime, **settings: Any) -> StepLoader:
    controller = DataFlowController("run0", metadata_store=store)
    controller.take_role("consumer")
    loading = LoaderSettings(batch_size=1, block_size=1, **settings)
    return StepLoader(controller, loading, report=clock.report, clock=clock)


def test_the_time_without_samples_is_counted_and_told_while_it_passes() -> None:
    """Exactly, by the clock: for the first samples, for the next ones, and for the stream's end."""
    store = InMemoryMetadataStore()
    clock = PassingTime(store)
    loader = loader_of(store, clock)
    clock.at[2.5] = CommittedRefLog(store).close
    assert loader.next_step(1) is None
    assert loader.exhausted
    assert loader.blocked_seconds == 2.5
    assert clock.told == [(at, "blocked", at) for at in (0.25, 1.25, 2.25)]
    clock.now = 50.0
    loader.first_refs(1)
    assert loader.blocked_seconds == 2.5, "what is there is not waited for"


def test_a_sample_that_nobody_captures_again_is_waited_for_until_the_deadline() -> None:
    """By the clock that was given; the time counts as blocked, and the sample stays committed."""
    store = InMemoryMetadataStore()
    clock = PassingTime(store)
    store.add_tasks(["task-0"])
    store.lease_tasks("w", 1)
    store.commit_samples([sample_ref(0)])
    loader = loader_of(store, clock, recapture_timeout_s=3.0)
    planned = loader.next_step(1)
    assert planned is not None
    with pytest.raises(StoreError, match="not captured again"):
        loader.recapture.wait_for(planned.refs[0], "they are gone")
    loader.leave(planned)
    assert clock.now == loader.blocked_seconds == 3.25
    assert store.lost_ids() == ["run0:s0"]
    successor = DataFlowController("run0", metadata_store=store)
    successor.take_role("consumer")
    assert successor.begin_step(StepPlan(1, ("run0:s0",), 1)).deaths == 0, "nobody died in the step"
