"""Which checkpoint a new consumer goes on from, when others write, claim and sweep at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline.errors import FencedError, LedgerError
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.facts import LEDGER
from paceline.ledger.records import CheckpointRecord, TrainedSample, TrainedStep, chain_of
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.passes import START, Position
from paceline.testing.ledger_calls import RUN_ID, capture, consumer_of, producer_of
from paceline.training.checkpoint import Checkpoint, CheckpointFolder
from paceline.training.recovery import find_checkpoint, recover


class Run:
    """A ledger with three samples, one a step, and a folder of checkpoints."""

    def __init__(self, tmp_path: Path) -> None:
        self.ledger = SQLiteLedger()
        capture(producer_of(self.ledger), 0, 1, 2)
        self.folder = CheckpointFolder(tmp_path, RUN_ID)
        self.reported: list[str] = []

    def consumer(self) -> ConsumerSession:
        return consumer_of(self.ledger)

    def write(
        self, step: int, epoch: int, after: CheckpointRecord | None, *, lsn: int = 0, ledger: str = ""
    ) -> CheckpointRecord:
        """The checkpoint of one step more than `after` has."""
        lineage = (TrainedStep(step, 0, (TrainedSample(step - 1, f"run0:s{step - 1}", step - 1, True),)),)
        chain = chain_of(after.chain if after else "", [one.plan for one in lineage])
        previous = after.name if after else ""
        content = Checkpoint(step, step, {"w": b"w"}, {}, lineage, previous, chain, epoch, lsn, ledger)
        return self.folder.write(content)

    def recover(self, session: ConsumerSession) -> CheckpointRecord | None:
        def report(event: str, **_: Any) -> None:
            self.reported.append(event)

        found = find_checkpoint(session, self.folder, session.epoch - 1, report)
        return found[0] if found else None


def test_a_replaced_consumer_claims_nothing_of_its_successor(tmp_path: Path) -> None:
    """Held up while it started, it finds a checkpoint that its successor has not recorded yet."""
    run = Run(tmp_path)
    held_up, successor = run.consumer(), run.consumer()
    written = run.write(1, successor.epoch, None)
    with pytest.raises(FencedError):
        run.recover(held_up)
    assert run.folder.read(written).step == 1, "it is where the successor is about to say it is"


def test_a_checkpoint_that_a_zombie_claims_first_is_found_under_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zombie had looked before it was replaced, and renames what the successor has just listed."""
    run = Run(tmp_path)
    run.write(1, 0, None)
    zombie, successor = run.consumer(), run.consumer()
    claim = run.folder.claim
    zombies = [zombie]

    def after_the_zombie(record: CheckpointRecord, epoch: int) -> CheckpointRecord | None:
        if zombies:
            claim(record, zombies.pop().epoch)
        return claim(record, epoch)

    monkeypatch.setattr(run.folder, "claim", after_the_zombie)
    head = run.recover(successor)
    assert head is not None
    assert (head.step, run.ledger.snapshot().checkpoints) == (1, (head,))
    assert run.folder.read(head).step == 1


def test_what_follows_a_damaged_head_is_given_up_with_it(tmp_path: Path) -> None:
    """A checkpoint was being written after it when the power failed: its ledger entries are lost, and the
    head before it turns out damaged. No ledger is older than anything here: the steps are run again."""
    run = Run(tmp_path)
    first = run.consumer()
    one = run.write(1, first.epoch, None)
    assert run.recover(first) is not None
    [one] = run.ledger.snapshot().checkpoints
    two = run.write(2, first.epoch, one)
    run.recover(first)
    two = run.ledger.snapshot().checkpoints[-1]
    three = run.write(3, first.epoch, two, lsn=1_000)
    (tmp_path / two.name / "w").write_bytes(b"damaged")
    for _ in range(2):  # the consumer that fell back died before it swept
        assert run.recover(run.consumer()) == one
    assert run.reported[-1] == "fall_back"
    assert run.folder.read(three).step == 3, "it is for the sweep to remove"


def test_an_old_ledger_over_newer_checkpoints_is_called_old(tmp_path: Path) -> None:
    """Its own are gone, and to restore those or begin anew would give whole weights up: it names them."""
    run = Run(tmp_path)
    first = run.consumer()
    run.write(1, first.epoch, None)
    run.recover(first)
    [one] = run.ledger.snapshot().checkpoints
    two = run.write(2, first.epoch, one)
    three = run.write(3, first.epoch, two)
    run.folder.sweep({two.name, three.name})
    with pytest.raises(LedgerError, match=r"The ledger is old") as caught:
        run.recover(run.consumer())
    assert two.name in str(caught.value)
    assert three.name in str(caught.value)
    assert run.folder.read(three).step == 3


def test_a_start_says_where_the_run_stands(tmp_path: Path) -> None:
    """Trainer and loader are built from it: at the beginning, and after a checkpoint."""
    capture(producer_of(ledger := SQLiteLedger()), 0)
    session, folder = ConsumerSession(ledger, RUN_ID), CheckpointFolder(tmp_path, RUN_ID)
    start = recover(session, folder, lambda *_, **__: None)
    assert (start.head, start.step, start.position) == (None, 0, START)
    lineage = (TrainedStep(1, 0, (TrainedSample(0, "run0:s0", 0, True),)),)
    chain = chain_of("", [one.plan for one in lineage])
    values = {"position": [2, 5]}
    record = folder.write(Checkpoint(1, 1, {"w": b"w"}, values, lineage, "", chain, session.epoch, 0))
    epoch = session.epoch
    again = recover(session, folder, lambda *_, **__: None)
    assert session.epoch == epoch + 1
    assert again.head is not None
    assert again.head.manifest_digest == record.manifest_digest
    assert (again.step, again.head.first_place, again.position) == (1, 1, Position(2, 5))
    assert again.checkpoint is not None
    assert again.checkpoint.files["w"] == b"w", "under the name by which it was claimed"


@pytest.mark.parametrize("own", ["this", "before", ""])
def test_a_checkpoint_of_this_ledger_is_gone_on_from(tmp_path: Path, own: str) -> None:
    """Or of one that it replaced, or one that was written before ledgers had identities."""
    run = Run(tmp_path)
    run.ledger.set_facts(None, {LEDGER: {"identity": "this", "replaces": ["before"], "folder": ""}})
    session = run.consumer()
    run.write(1, session.epoch, None, ledger=own)
    assert run.recover(session) is not None


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_checkpoint_of_another_ledger_is_not_gone_on_from(tmp_path: Path, is_recorded: bool) -> None:
    """This ledger would train again what those weights contain."""
    run = Run(tmp_path)
    session = run.consumer()
    record = run.write(1, session.epoch, None, ledger="other")
    if is_recorded:
        session.adopt(record, run.folder.read(record).lineage)
    with pytest.raises(LedgerError, match="was written with ledger other, and this one is unknown"):
        run.recover(session)
