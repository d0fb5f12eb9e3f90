"""The SQLite store behaves like the in-memory one, whatever is called in whatever order."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.testing.ledger_machine import DisagreementError, LedgerTwins, small_blocks
from paceline.testing.ledger_moves import PICKS, WEIGHTS, LedgerMoves, Picks, play_at_random

MEMORY = Path("/dev/shm")
PROFILE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=80,
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
)


class LedgerMachine(RuleBasedStateMachine):
    """Every rule is a move on both stores; the checks are in LedgerTwins."""

    def __init__(self) -> None:
        super().__init__()
        self._open = ExitStack()
        place = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self._folder = Path(self._open.enter_context(place))

    @initialize(block=st.sampled_from([2, 3, 4096]), fold_from=st.sampled_from([1, 2]))
    def begin_empty(self, block: int, fold_from: int) -> None:
        self._open.enter_context(small_blocks(block))
        self.twins = LedgerTwins(self._folder / "ledger.db", fold_from=fold_from)
        self._open.callback(self.twins.close)
        self.moves = LedgerMoves(self.twins)

    def teardown(self) -> None:
        self._open.close()


def play_many(folder: Path, seeds: Iterable[int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        counts.update(play_at_random(place, seed, 60))
    return counts


def _as_rule(name: str) -> Any:
    def move(self: LedgerMachine, picks: bytes) -> None:
        getattr(self.moves, name)(Picks(picks))

    move.__name__ = name
    return rule(picks=st.binary(min_size=PICKS, max_size=PICKS))(move)


for _name in WEIGHTS:
    setattr(LedgerMachine, _name, _as_rule(_name))


def test_any_calls_leave_both_stores_alike() -> None:
    """Results, errors and all that can be read agree after every call, and the protocol holds."""
    run_state_machine_as_test(LedgerMachine, settings=PROFILE)


def test_long_lives_of_samples_leave_both_stores_alike(tmp_path: Path) -> None:
    """Seeded runs that get through capture, training, release, folding, going back and rolling forward."""
    counts = play_many(tmp_path, range(60))
    met = {name: count for name, count in counts.items() if name.startswith("met:")}
    assert len(met) == 8, met
    assert min(met.values()) > 0, met


@pytest.mark.parametrize(
    ("name", "method", "wrong"),
    [
        ("a folded sample is fresh", "_folded_record", lambda self, sample_id: None),
        ("acks are never durable", "_become_head", lambda self, checkpoint: None),
        ("lost prompts stay done", "_reopen_task", lambda self, ordinal, task_id: None),
        ("every task can be leased again", "_finish_task", lambda self, task_id, failed_too=False: None),
    ],
)
def test_the_machine_finds_a_store_that_behaves_otherwise(
    name: str, method: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail."""
    monkeypatch.setattr(SQLiteMetadataStore, method, wrong)
    with pytest.raises(DisagreementError):
        play_many(tmp_path, range(60))
