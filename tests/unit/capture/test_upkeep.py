"""What a producer's start compares, while the other producers go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.features.store import Written
from paceline.ledger.records import State
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.small_run import RUN_ID, SmallRun


def test_a_sample_that_another_producer_has_just_captured_again_is_not_lost_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new bytes would be captured once more, and the consumer would wait for them."""
    run, sample_id = SmallRun(tmp_path), f"{RUN_ID}:3"
    run.producer()[1]()
    ledger = SQLiteLedger(run.db)
    before = ledger.find([sample_id])[sample_id].ref
    run.features.free([(sample_id, before.generation)])
    real, looks = run.features.written, list[int]()

    def written() -> list[Written]:
        found = real()
        looks.append(len(found))
        if len(looks) == 2:  # what the other one does between this look and the report
            monkeypatch.setattr(run.features, "written", real)
            run.place = {"worker": "1"}
            run.producer()[1]()
        return found

    monkeypatch.setattr(run.features, "written", written)
    free = ledger.snapshot().next_generation
    run.producer()[1]()
    assert len(looks) == 2
    after = ledger.find([sample_id])[sample_id]
    assert (after.state, after.ref.generation) == (State.PRESENT, free), "it was captured again once"
