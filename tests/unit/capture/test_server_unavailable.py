"""An engine whose server stays away: the run ends, and no prompt is to blame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from paceline.engines.engine import Captured, CaptureRequest
from paceline.errors import ServerUnavailableError
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.small_run import SmallRun
from paceline.testing.synthetic import SyntheticEngine
from paceline.types import Feature


class Away(SyntheticEngine):
    """Its server is away from the second group on, until `is_back`."""

    is_back = False

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        if self.captured and not self.is_back:
            raise ServerUnavailableError("The server is away.", next="start it.")
        return super().capture(group, features)


def test_a_server_that_stays_away_ends_the_run_and_fails_no_prompt(tmp_path: Path) -> None:
    """No isolation, no failed prompt, no lease that would count as a death; the next start goes on."""
    run = SmallRun(tmp_path)
    run.engine = engine = Away()
    with pytest.raises(ServerUnavailableError, match="The server is away"):
        run.producer()[1]()
    assert len(engine.captured) == 1, "no half of the group was tried"
    ledger = SQLiteLedger(run.db)
    assert (ledger.snapshot().prompts.failed, ledger.snapshot().prompts.leased) == (0, 0)
    engine.is_back = True
    run.run()
    now = SQLiteLedger(run.db).snapshot()
    assert (now.prompts.failed, now.samples_trained) == (0, now.committed)
