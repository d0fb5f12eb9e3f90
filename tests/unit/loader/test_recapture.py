"""A feature that is gone: lost, or freed by a successor that trained it."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline import crashpoints
from paceline.errors import FencedError
from paceline.features.stores.memory import InMemoryFeatureStore
from paceline.ledger.controller import DataFlowController
from paceline.ledger.records import CheckpointRecord, StepPlan, chain_of
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.loader.loader import StepLoader
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
    loader = StepLoader(replaced, InMemoryFeatureStore(budget_bytes=1 << 20), batch_size=1)
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
    seen: list[str] = []
    monkeypatch.setattr(crashpoints, "_watch", seen.append)
    with pytest.raises(FencedError):
        loader.fetch([ref])
    assert "loader.after_recapture" not in seen
