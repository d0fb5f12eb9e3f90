"""A history of calls, held against the ledger it ended in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.fsck.history import check_history
from paceline.testing.run_by_hand import RunByHand


def call(
    op: str, phase: str, *ids: str, actor: str = "producer", epoch: int = 1, lsn: int | None = None
) -> Any:
    return {"op": op, "phase": phase, "actor": actor, "epoch": epoch, "lsn": lsn, "ids": list(ids)}


def done(op: str, *ids: str, lsn: int | None = None, phase: str = "ok", **who: Any) -> list[Any]:
    """A call and its result."""
    return [call(op, "invoke", *ids, **who), call(op, phase, *ids, lsn=lsn, **who)]


SOUND = [
    *done("acquire", lsn=2),
    *done("commit", "run0:s0", "run0:s1", lsn=5),
    *done("commit", "run0:s9", phase="fail"),
    *done("commit", "run0:s2", phase="unknown"),
    call("commit", "invoke", "run0:s3"),  # killed
    *done("acquire", epoch=2, lsn=6),
    *done("commit", "run0:s2", epoch=2, phase="fail"),
    *done("quarantine", "run0:s1", actor="consumer:1", lsn=7),
    # Begun before its successor came, so it may have been in time.
    call("commit", "invoke", "run0:s0", actor="producer:old", epoch=2),
    *done("acquire", epoch=3, lsn=8),
    call("commit", "ok", "run0:s0", actor="producer:old", epoch=2, lsn=7),
]
BROKEN = {
    "C1 the commit of samples returned, and the ledger does not know it: run0:s9": done(
        "commit", "run0:s9", epoch=3, lsn=9
    ),
    "C1 the quarantine of samples returned, and the ledger does not know it: run0:s0": done(
        "quarantine", "run0:s0", actor="consumer:1", lsn=9
    ),
    "C6 every commit of samples failed, and yet it happened: run0:s3": done("commit", "run0:s3", phase="fail")
    * 2,
    "C7 producer of epoch 2 did commit after epoch 3 began: run0:s0": done(
        "commit", "run0:s0", epoch=2, lsn=9
    ),
    "C7 producer acquired epoch 3 after a newer one": done("acquire", epoch=3, lsn=9),
    "C8 producer saw log number 4 after 8 had been seen": done("commit", "run0:s0", epoch=3, lsn=4),
    "C8 the ledger ends at log number": done("commit", "run0:s0", epoch=3, lsn=9999),
}


def write(run: RunByHand, calls: list[Any]) -> Path:
    path = run.folder / "history.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in calls) + '{"op": "comm')
    return path


@pytest.fixture
def run(by_hand: RunByHand) -> RunByHand:
    ids = by_hand.capture(4)
    by_hand.consumer.quarantine(ids[1:2], step=None, reason="never readable")
    by_hand.consumer.set_facts({"end": True})
    assert by_hand.ledger.lsn() == 10
    return by_hand


def test_a_sound_history_passes(run: RunByHand) -> None:
    """Failed, unknown and unanswered calls included; a torn last line is no record."""
    report = check_history(write(run, SOUND))
    assert (report.errors, report.counts) == ([], {"calls": 10})


@pytest.mark.parametrize("told", BROKEN)
def test_every_broken_history_is_found(run: RunByHand, told: str) -> None:
    """By the rule that names it, with the ids."""
    calls = SOUND if "C6" not in told else [entry for entry in SOUND if "run0:s3" not in entry["ids"]]
    [error] = check_history(write(run, [*calls, *BROKEN[told]])).errors
    assert error.startswith(told)


def test_what_cannot_be_read_is_an_error(run: RunByHand) -> None:
    """No history, or lines that are none."""
    assert (
        check_history(run.folder / "nothing").errors[0].startswith("C8 ledger.db or history cannot be read")
    )
    (run.folder / "history.jsonl").write_text("no json\n")
    assert check_history(run.folder / "history.jsonl").errors
