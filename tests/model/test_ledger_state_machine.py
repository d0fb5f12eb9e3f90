"""Every store behaves like the specification, whatever is called in whatever order."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from paceline.ledger.records import Order
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.ledger_machine import DisagreementError, LedgerTwins
from paceline.testing.ledger_moves import PICKS, WEIGHTS, LedgerMoves, Picks
from paceline.testing.ledger_plays import play_at_random
from paceline.testing.ledger_subjects import RedisSubject, SQLiteSubject, Subject
from paceline.testing.valkey_server import ValkeyServer

MEMORY = Path("/dev/shm")
PROFILE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
)


class LedgerMachine(RuleBasedStateMachine):
    """Every rule is a move on both ledgers; the checks are in LedgerTwins."""

    def __init__(self) -> None:
        super().__init__()
        self._open = ExitStack()
        place = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self._folder = Path(self._open.enter_context(place))

    @initialize(
        block=st.sampled_from([2, 3, 4096]),
        archive_from=st.sampled_from([1, 2]),
        order=st.sampled_from(Order),
    )
    def begin_empty(self, block: int, archive_from: int, order: Order) -> None:
        subject = self.make_subject()
        subject.block_size, subject.archive_from = block, archive_from
        self.twins = LedgerTwins(subject)
        self._open.callback(self.twins.close)
        self.moves = LedgerMoves(self.twins, order)

    def make_subject(self) -> Subject:
        return SQLiteSubject(self._folder / "ledger.db")

    def teardown(self) -> None:
        self._open.close()


def play_many(make_subject: Callable[[int], Subject], seeds: Iterable[int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        counts.update(play_at_random(make_subject(seed), seed, 60))
    return counts


def sqlite_in(folder: Path) -> Callable[[int], Subject]:
    return lambda seed: SQLiteSubject(folder / f"{seed}.db")


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
    """Seeded runs that get through capture, training, release, archiving, going back and rolling forward."""
    counts = play_many(sqlite_in(tmp_path), range(0, 60, 2))
    met = {name: count for name, count in counts.items() if name.startswith("met:")}
    assert len(met) == 10, met
    assert min(met.values()) > 0, met


def test_long_lives_of_samples_on_a_server_leave_both_stores_alike(valkey: ValkeyServer) -> None:
    """Some of the same seeded runs, which meet everything, on the scripts of the ledger on a server."""
    counts = play_many(lambda _: RedisSubject(valkey), (13, 15, 20, 23, 24, 33, 38, 40))
    met = {name: count for name, count in counts.items() if name.startswith("met:")}
    assert len(met) == 10, met
    assert min(met.values()) > 0, met


@pytest.mark.parametrize(
    ("name", "method", "wrong"),
    [
        ("an archived sample is fresh", "_is_archived", lambda self, ref: False),
        ("acks of dead weights count", "_undo_provisional_acks", lambda self: None),
        ("lost prompts stay done", "_reopen_prompt", lambda self, ordinal: None),
        ("every prompt can be leased again", "_finish_prompt", lambda self, ordinal: None),
        ("a start ends nobody's work", "_end_work_of", lambda self, worker: None),
        ("the log is read past a hole", "_settled", lambda self: self._run().num_prompts),
    ],
)
def test_the_machine_finds_a_ledger_that_behaves_otherwise(
    name: str, method: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail."""
    monkeypatch.setattr(SQLiteLedger, method, wrong)
    with pytest.raises(DisagreementError):
        play_many(sqlite_in(tmp_path), range(60))


def test_a_trained_sample_whose_second_capture_fails_stays_trained(tmp_path: Path) -> None:
    play_at_random(SQLiteSubject(tmp_path / "ledger.db"), 56, 90)


def test_an_archived_visit_of_a_sample_that_is_still_there_is_no_licence_to_commit_it(tmp_path: Path) -> None:
    """In arrival order, under a generation that was another sample's."""
    play_at_random(SQLiteSubject(tmp_path / "ledger.db"), 564, 90)
