"""Under the ledger: power failures, failing file operations, flipped bits."""

from __future__ import annotations

import random
from pathlib import Path

import apsw
import pytest

from paceline.errors import LedgerError, UnknownResultError
from paceline.testing import broken_files
from paceline.testing.broken_files import (
    FAULTS,
    fail_calls,
    fail_recovery,
    lose_power,
    open_ledger,
)
from paceline.testing.ledger_calls import producer_of, refs_of
from paceline.testing.ledger_history import History, state_of
from paceline.testing.recording_vfs import FaultyVFS

FEWEST = {
    "EIO or EDQUOT at a write": 150,
    "ENOSPC at a write": 150,
    "a short write": 150,
    "a failed sync": 19,
    "EIO at a read": 100,
}


def test_what_was_acknowledged_survives_power_loss(memory: Path) -> None:
    """durability="full": every call that returned is there, whatever the disk did with unsynced writes."""
    counts = lose_power(memory, 0, "full", calls=60, per_interval=3)
    assert counts["images"] > 200


@pytest.mark.parametrize("seed", range(4))
def test_what_weights_depend_on_survives_power_loss(memory: Path, seed: int) -> None:
    """durability="head": every call up to the last final one is there; what else is there is a prefix."""
    counts = lose_power(memory, seed, "head", calls=120, per_interval=6)
    assert counts["images"] > 50


def test_a_promise_that_is_not_kept_would_be_noticed(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask of "head" what only "full" promises, and the images show that it is not so."""
    monkeypatch.setattr(broken_files, "FINAL", {*broken_files.FINAL, "commit", "plan"})
    with pytest.raises(AssertionError, match="was acknowledged"):
        lose_power(memory, 0, "head", calls=120, per_interval=6)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_file_operation_leaves_whole_calls(memory: Path, fault: str, lasting: bool) -> None:
    """Whichever operation fails, once or from then on: the error advises and the next process goes on."""
    counts = fail_calls(memory / "calls", 3, fault, lasting=lasting, calls=5)
    counts += fail_recovery(memory / "recovery", 3, fault, lasting=lasting, calls=5)
    assert counts["faults"] == counts["runs"] - 2
    assert counts["faults"] >= FEWEST.get(fault, 2)


def test_after_a_failed_sync_the_process_writes_no_more(tmp_path: Path) -> None:
    """What the disk holds is unknown then; the next process reads what is really there."""
    vfs = FaultyVFS("failed-sync")
    ledger = open_ledger(tmp_path, "full", vfs.name)
    producer = producer_of(ledger)
    producer.lease(2)
    first, second = refs_of(producer, 0, 1)
    vfs.arm(apsw.IOError, ("sync",), 1, lasting=False)
    with pytest.raises(UnknownResultError, match="check the disk"):
        ledger.commit(producer.fence.call(90), [first])
    with pytest.raises(LedgerError, match="stopped writing"):
        ledger.commit(producer.fence.call(91), [second])
    ledger.close()
    assert open_ledger(tmp_path).commit(producer.fence.call(92), [second]) == [True]


def test_a_flipped_bit_of_the_write_ahead_log_takes_calls_from_the_end_and_nothing_else(
    tmp_path: Path,
) -> None:
    """SQLite ends the log before the damaged frame: what is read is what was true at an earlier call."""
    live = tmp_path / "live"
    live.mkdir()
    ledger = open_ledger(live)
    states = {0: state_of(ledger)}
    for _, call in History(ledger, random.Random(9)).calls(30):
        call()
        states[ledger.lsn()] = state_of(ledger)
    database, log = ((live / name).read_bytes() for name in ("ledger.db", "ledger.db-wal"))
    ledger.close()
    rng = random.Random(1)
    for number in range(60):
        place = tmp_path / f"flip-{number}"
        place.mkdir()
        data = bytearray(log)
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << (bit % 8)
        (place / "ledger.db").write_bytes(database)
        (place / "ledger.db-wal").write_bytes(data)
        read = open_ledger(place)
        assert state_of(read) == states[read.lsn()], f"bit {bit}"
        read.close()
