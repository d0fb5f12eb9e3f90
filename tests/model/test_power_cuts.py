"""Power failures of whole runs with durability "head": the ledger falls back behind the folders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from paceline.ledger.stores.sqlite.database import Database
from paceline.testing.light_run import RunShape
from paceline.testing.power_cuts import Violation, cut_everywhere

SHAPES = {
    "two passes": RunShape(prompts=13, group=3, batch=3, passes=2, interval=2),
    "checkpoints of every step": RunShape(prompts=9, group=3, batch=2, interval=1, kept=3),
    "bad samples": RunShape(prompts=12, group=4, batch=3, passes=2, interval=3, bad_prompt=2, bad_sample=5),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_goes_on_from_a_power_failure_at_any_point(memory: Path, shape: str) -> None:
    """The same weights, and the checker finds nothing wrong before or after."""
    counts = cut_everywhere(memory, SHAPES[shape], every=9)
    assert counts["commits lost"] > 50


def test_a_commit_that_ought_to_be_synced_and_is_not_is_found(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: nothing that durable weights depend on is synced."""
    mutation: Callable[..., AbstractContextManager[Any]] = Database._mutation

    def not_final(self: Database, fence: Any, *, final: bool = False) -> Any:
        return mutation(self, fence, final=False)

    monkeypatch.setattr(Database, "_mutation", not_final)
    with pytest.raises(Violation):
        cut_everywhere(memory, SHAPES["two passes"], every=9)
