"""A run that refuses its prompts at the start has bound itself to none."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.errors import ConfigError
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.small_run import SmallRun


def test_after_a_refusal_for_length_the_run_may_be_given_other_prompts(tmp_path: Path) -> None:
    """The ledger knows prompts only once they can be captured."""
    run = SmallRun(tmp_path, num_prompts=6)
    run.capture = {"max_prompt_tokens": 12, "too_long": "refuse"}
    run.prompts[3] = "x" * 200
    with pytest.raises(ConfigError, match="too_long"):
        run.producer()[1]()
    assert SQLiteLedger(run.db).snapshot().prompts.known == 0
    del run.prompts[3]
    run.producer()[1]()
    assert SQLiteLedger(run.db).snapshot().committed == 5
