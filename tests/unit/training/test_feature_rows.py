"""Rows that the method never reads: left out of the store or not, a run ends in the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.ledger.channel import CommittedRefLog
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.methods.eagle3.method import Eagle3Method
from paceline.testing.small_run import SmallRun, same_bits, weights


def rows_of(run: SmallRun) -> list[tuple[int, int]]:
    """Of every committed sample: tokens, and rows of the last hidden states."""
    refs = CommittedRefLog(SQLiteMetadataStore(run.db)).poll()
    return [(ref.num_tokens, ref.feature_specs["last_hidden_states"].shape[0]) for ref in refs]


def test_a_run_begun_with_all_rows_goes_on_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of an older run directory is refused or captured again; the weights are the same throughout."""
    plain = weights(SmallRun(tmp_path / "plain").run())
    begun = SmallRun(tmp_path / "begun")
    with monkeypatch.context() as before:
        before.setattr(Eagle3Method, "feature_rows", lambda _: {})
        begun.producer()[1](2)
        assert [rows == tokens for tokens, rows in rows_of(begun)] == [True] * 8
    begun.producer()[1]()
    assert [rows == 6 for _, rows in rows_of(begun)] == [False] * 8 + [True] * 6
    assert same_bits(weights(begun.run()), plain)
    assert len(begun.engine.captured) == 4
