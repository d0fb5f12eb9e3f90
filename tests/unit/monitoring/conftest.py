from __future__ import annotations

from pathlib import Path

import pytest

from paceline.testing.run_by_hand import RunByHand


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One checkpoint of two samples, two more that are not trained."""
    by_hand = RunByHand(tmp_path / "run")
    by_hand.train(by_hand.capture(2))
    by_hand.checkpoint()
    by_hand.capture(2)
    by_hand.ledger.close()
    return by_hand.folder
