"""Drafts held beyond their checkpoints: training never waits, and no recovery takes them for more."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from paceline import crashpoints
from paceline.errors import CheckpointDamagedError
from paceline.fsck.checker import check
from paceline.ledger.records import CheckpointRecord
from paceline.parts import part_name
from paceline.testing.recording_files import Killed
from paceline.testing.run_by_hand import RunByHand
from paceline.training.held_drafts import HeldDrafts
from paceline.training.recovery import find_checkpoint


def held_of(run: RunByHand) -> HeldDrafts:
    return HeldDrafts(run.folder / "checkpoints", "run0", "weights.bin")


def trained(run: RunByHand, checkpoints: int) -> CheckpointRecord:
    """Train so many steps with a checkpoint each; the head."""
    for _ in range(checkpoints):
        run.train(run.capture(1))
        run.checkpoint(keep=2)
    head = run.ledger.snapshot().head
    assert head is not None
    return head


def test_a_held_draft_outlives_its_checkpoint(tmp_path: Path) -> None:
    """And costs no bytes while both are there."""
    run = RunByHand(tmp_path)
    record, held = trained(run, 1), held_of(run)
    held.hold(record)
    held.hold(record)
    kept = tmp_path / "checkpoints" / record.name / "weights.bin"
    assert kept.samefile(held.folder / record.name / "weights.bin")
    trained(run, 3)
    assert not (tmp_path / "checkpoints" / record.name).exists()
    got = held.read(record)
    assert (got.step, got.files["weights.bin"]) == (1, b"weights" * 50)
    assert held.names() == {record.name}
    assert check(tmp_path).errors == []


def test_a_draft_in_parts_is_held_with_all_of_them(tmp_path: Path) -> None:
    """Without one of them it is none; reader and checker say which is missing."""
    run = RunByHand(tmp_path)
    run.names = tuple(part_name("draft.safetensors", rank, 2) for rank in range(2))
    record, held = trained(run, 1), HeldDrafts(run.folder / "checkpoints", "run0", "draft.safetensors")
    held.hold(record)
    trained(run, 3)
    assert dict(held.read(record).files) == dict.fromkeys(run.names, run.weights)
    assert check(tmp_path).errors == []
    (held.folder / record.name / run.names[1]).unlink()
    with pytest.raises(CheckpointDamagedError):
        held.read(record)
    assert check(tmp_path).errors_of("C10") == [
        f"the held draft of checkpoint {record.name}: draft-00002-of-00002.safetensors is missing"
    ]


def test_a_checkpoint_that_lacks_a_part_is_not_held_and_the_checker_says_so(tmp_path: Path) -> None:
    run = RunByHand(tmp_path)
    run.names = (part_name("draft.safetensors", 0, 2),)
    record, held = trained(run, 1), HeldDrafts(run.folder / "checkpoints", "run0", "draft.safetensors")
    with pytest.raises(FileNotFoundError, match="of which there is draft-00001-of-00002"):
        held.hold(record)
    [told] = check(tmp_path).errors_of("C5")
    assert "does not name draft-00002-of-00002.safetensors, and names other parts" in told


def test_a_checkpoint_that_is_retired_meanwhile_is_not_held(tmp_path: Path) -> None:
    """Whoever wanted to hold it takes the newest then; nothing half-held stays."""
    run = RunByHand(tmp_path)
    record, held = trained(run, 1), held_of(run)
    trained(run, 3)
    with pytest.raises(FileNotFoundError):
        held.hold(record)
    held.hold(trained(run, 1))
    assert sorted(path.name for path in held.folder.iterdir()) == sorted(held.names())


def test_a_kill_while_it_is_held_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """The name comes last, and the next one who holds a draft sweeps what was left."""
    run = RunByHand(tmp_path)
    record, held = trained(run, 1), held_of(run)

    def kill(name: str) -> None:
        raise Killed(name)

    crashpoints.watch(kill)
    try:
        with pytest.raises(Killed):
            held.hold(record)
    finally:
        crashpoints.watch(None)
    assert held.names() == set()
    assert "unfinished or swept by the next measurement" in "\n".join(check(tmp_path).notes)
    held.hold(record)
    assert [path.name for path in held.folder.iterdir()] == [record.name]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_without_hard_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A file system may have none, and a checkpoint's folder may lie on another disk."""
    run = RunByHand(tmp_path)
    record, held = trained(run, 1), held_of(run)

    def no_link(source: object, target: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_link)
    held.hold(record)
    trained(run, 3)
    assert held.read(record).files["weights.bin"] == b"weights" * 50


def test_a_run_goes_on_from_its_newest_checkpoint_and_not_from_its_best(tmp_path: Path) -> None:
    """Recovery neither adopts nor sweeps a held draft, not even one that is newer than the ledger's head."""
    run = RunByHand(tmp_path)
    held = held_of(run)
    held.hold(trained(run, 1))
    head = trained(run, 2)
    found = find_checkpoint(run.consumer, run.checkpoints, 1, lambda *_, **__: None)
    assert found is not None
    assert found[0] == head
    run.checkpoints.sweep({record.name for record in run.consumer.checkpoints()})
    assert len(held.names()) == 1


def test_released_drafts_are_gone_and_the_kept_one_stays(tmp_path: Path) -> None:
    """Only the best is worth its bytes."""
    run = RunByHand(tmp_path)
    held = held_of(run)
    held.release(())
    first = trained(run, 1)
    held.hold(first)
    second = trained(run, 1)
    held.hold(second)
    held.release({second.name})
    assert held.names() == {second.name}
    assert (tmp_path / "checkpoints" / first.name / "weights.bin").exists(), "the checkpoint itself stays"


def test_damage_to_a_held_draft_is_found(tmp_path: Path) -> None:
    """By who reads it, and by the checker."""
    run = RunByHand(tmp_path)
    record, held = trained(run, 1), held_of(run)
    held.hold(record)
    trained(run, 3)
    (held.folder / record.name / "weights.bin").write_bytes(b"weighty" * 50)
    with pytest.raises(CheckpointDamagedError):
        held.read(record)
    assert check(tmp_path).errors_of("C10") == [
        f"the held draft of checkpoint {record.name}: weights.bin is damaged"
    ]
    (held.folder / record.name / "manifest.json").write_bytes(b"{}")
    assert "not the one that it was named after" in check(tmp_path).errors_of("C10")[0]
    (held.folder / record.name / "manifest.json").unlink()
    assert "cannot be read" in check(tmp_path).errors_of("C10")[0]
