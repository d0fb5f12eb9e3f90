"""Checkpoints: durable before they have a name, and never trusted without their digests."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from paceline import crashpoints, durable_files
from paceline.errors import CheckpointDamagedError, CheckpointError
from paceline.ledger.records import TrainedSample, TrainedStep
from paceline.training.checkpoint import Checkpoint, CheckpointFolder
from paceline.training.tensor_files import from_bytes


def checkpoint(step: int = 3) -> Checkpoint:
    weights = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3) * step, "d2t": torch.tensor([1, 2])}
    files = {
        "draft.safetensors": save(weights),
        "rng.safetensors": save({"torch": torch.get_rng_state()}),
    }
    lineage = (TrainedStep(step, 1, (TrainedSample(23, "run0:a", 23, True),)),)
    return Checkpoint(step, 24, files, {"method": "m"}, lineage, "step-before", "c0ffee", epoch=2, lsn=7)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Tensors, values, step and log position are what was written."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint())
    got = folder.read(record)
    assert got == checkpoint()
    assert from_bytes("draft", got.files["draft.safetensors"])["d2t"].dtype == torch.int64
    assert torch.equal(from_bytes("rng", got.files["rng.safetensors"])["torch"], torch.get_rng_state())


def test_a_whole_checkpoint_that_no_ledger_names_is_found(tmp_path: Path) -> None:
    """What a crash between the rename and the head's record leaves; damaged ones are nobody's."""
    folder = CheckpointFolder(tmp_path, "run0")
    known, orphan, damaged = (folder.write(checkpoint(step)) for step in (1, 3, 2))
    (tmp_path / damaged.name / "draft.safetensors").write_bytes(b"")
    assert folder.unrecorded([known]) == [(orphan, checkpoint(3))]


@pytest.mark.parametrize("name", ["manifest.json", "draft.safetensors", "rng.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "empty"])
def test_any_damage_is_found(tmp_path: Path, name: str, harm: str) -> None:
    """One flipped bit, a torn file or a missing one: the checkpoint is refused with advice."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint())
    path = tmp_path / record.name / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-1], "remove": b"", "empty": b""}[harm])
    if harm == "remove":
        path.unlink()
    with pytest.raises(CheckpointError, match="falls back"):
        folder.read(record)


def test_a_manifest_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    """The ledger's digest ties the record to its very folder."""
    folder = CheckpointFolder(tmp_path, "run0")
    first, second = folder.write(checkpoint(1)), folder.write(checkpoint(2))
    (tmp_path / first.name).rename(tmp_path / "x")
    (tmp_path / second.name).rename(tmp_path / first.name)
    with pytest.raises(CheckpointError, match="ledger's digest"):
        folder.read(first)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    """A folder copied from another run is not this run's."""
    record = CheckpointFolder(tmp_path, "run0").write(checkpoint())
    with pytest.raises(CheckpointError, match="another run"):
        CheckpointFolder(tmp_path, "run1").read(record)


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while writing leaves no half checkpoint and says what to do."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint(1))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="free space"):
        folder.write(checkpoint(2))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [record.name]
    assert folder.read(record).step == 1


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluator needs no optimizer file, and looking for whole checkpoints holds none of their bytes."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint())
    (tmp_path / record.name / "rng.safetensors").unlink()
    got = folder.read(record, names=["draft.safetensors"])
    assert got.files["draft.safetensors"] == checkpoint().files["draft.safetensors"]
    assert got.step == folder.read(record, names=()).step == 3
    whole = folder.write(checkpoint(4))
    read, real = list[str](), Path.read_bytes

    def noted(path: Path) -> bytes:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    [(found, content)] = folder.unrecorded([record])
    assert (found, read) == (whole, ["manifest.json"])
    assert content == checkpoint(4)


def test_a_file_that_is_damaged_after_it_was_verified_is_found_when_it_is_read(tmp_path: Path) -> None:
    """Its bytes are compared with the digest again."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint())
    got = folder.read(record)
    (tmp_path / record.name / "draft.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointDamagedError, match="does not match its digest"):
        got.files["draft.safetensors"]


def test_every_file_is_written_aside_and_the_manifest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then no name of a checkpoint is there; a file that fails leaves nothing."""
    folder, real, written = CheckpointFolder(tmp_path, "run0"), durable_files.write_file, []

    def noted(path: Path, content: bytes) -> None:
        assert [entry.suffix for entry in tmp_path.iterdir()] == [".new"]
        written.append(path.name)
        real(path, content)

    monkeypatch.setattr(durable_files, "write_file", noted)
    record = folder.write(checkpoint())
    assert written == [*checkpoint().files, "manifest.json"]

    def fail(path: Path, content: bytes) -> None:
        if path.name == written[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(durable_files, "write_file", fail)
    with pytest.raises(CheckpointError, match="free space"):
        folder.write(checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == [record.name]


def test_only_its_owner_may_read_a_checkpoint(tmp_path: Path) -> None:
    """As with the features: 0700 for folders, 0600 for files."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint())
    assert (tmp_path / record.name).stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / record.name).iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", ".", "", "step-00000003-000002-abc/../../x"])
def test_a_record_does_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """A name that no checkpoint can have is a damaged record, and nothing is opened."""
    folder = CheckpointFolder(tmp_path / "checkpoints", "run0")
    record = folder.write(checkpoint())
    (tmp_path / "checkpoints" / record.name).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointDamagedError, match="not a checkpoint's name"):
        folder.read(replace(record, name=name))


def test_a_checkpoint_that_was_moved_to_another_disk_is_read_and_its_link_swept(tmp_path: Path) -> None:
    """Its folder is a symbolic link then; what it leads to is left alone."""
    folder = CheckpointFolder(tmp_path / "checkpoints", "run0")
    record = folder.write(checkpoint())
    place, elsewhere = folder.folder / record.name, tmp_path / "other-disk"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    assert folder.read(record) == checkpoint()
    assert folder.sweep(keep={record.name}) == []
    assert folder.sweep(keep=set()) == [record.name]
    assert not place.is_symlink()
    assert (elsewhere / "draft.safetensors").exists()


def test_sweep_removes_what_no_record_names(tmp_path: Path) -> None:
    """Half-written folders and folders that never became head go; the named stay."""
    folder = CheckpointFolder(tmp_path, "run0")
    kept, orphan = folder.write(checkpoint(1)), folder.write(checkpoint(2))
    (tmp_path / "step-00000009-abc.new").mkdir()
    (tmp_path / "notes").mkdir()
    assert folder.sweep(keep={kept.name}) == [orphan.name, "step-00000009-abc.new"]
    assert {p.name for p in tmp_path.iterdir()} == {kept.name, "notes"}


def test_who_was_taken_over_cannot_fill_a_folder_that_is_being_swept(tmp_path: Path) -> None:
    """Its next file has no folder to go to, and nothing of its checkpoint stays behind."""
    zombie, successor = CheckpointFolder(tmp_path, "run0"), CheckpointFolder(tmp_path, "run0")

    def sweep_once(point: str) -> None:
        if point == "checkpoint.after_file":
            crashpoints.watch(sweep_meanwhile)
            successor.sweep(keep=set())

    def sweep_meanwhile(point: str) -> None:
        if point == "checkpoint.after_set_aside":
            crashpoints.watch(None)
            [gone] = tmp_path.glob("*.gone")
            with pytest.raises(FileNotFoundError):
                gone.with_suffix(".new").joinpath("late").write_bytes(b"")

    crashpoints.watch(sweep_once)
    with pytest.raises(CheckpointError, match="could not be written"):
        zombie.write(checkpoint())
    assert list(tmp_path.iterdir()) == []


def test_a_half_removed_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    """A crash between the two halves of a removal leaves what the next sweep removes."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint())
    (tmp_path / record.name).rename(tmp_path / f"{record.name}.gone")
    assert folder.unrecorded([]) == []
    assert folder.sweep(keep=set(), epoch=1) == []
    assert folder.sweep(keep=set(), epoch=2) == [f"{record.name}.gone"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """To fall back because a process ran out of file descriptors would throw good weights away."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint())

    def fail(_: Path) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "read_bytes", fail)
    for read in (lambda: folder.read(record), lambda: folder.unrecorded([])):
        with pytest.raises(CheckpointError, match="check that disk") as caught:
            read()
        assert not isinstance(caught.value, CheckpointDamagedError)


def test_a_late_sweep_leaves_a_successors_checkpoint_alone(tmp_path: Path) -> None:
    """A consumer that was taken over looked at the ledger before its successor wrote a checkpoint."""
    folder = CheckpointFolder(tmp_path, "run0")
    old, new = folder.write(replace(checkpoint(1), epoch=1)), folder.write(replace(checkpoint(2), epoch=2))
    assert folder.sweep(keep=set(), epoch=1) == [old.name]
    assert folder.read(new).step == 2
    assert folder.sweep(keep=set(), epoch=2) == [new.name]


WRITE = """
import sys
from pathlib import Path
from paceline.testing.kill_points import arm, pointed
from paceline.training.checkpoint import Checkpoint, CheckpointFolder
arm(sys.argv[2])
pointed(CheckpointFolder(Path(sys.argv[1]), "run0"), "checkpoints").write(
    Checkpoint(1, 1, {"draft.safetensors": b"weights"}, {})
)
"""


@pytest.mark.parametrize(
    ("point", "visible"),
    [
        ("checkpoint.before_rename", False),
        ("checkpoint.before_sync", True),
        ("checkpoints.write.after", True),
    ],
)
def test_a_kill_leaves_a_whole_checkpoint_or_none(tmp_path: Path, point: str, visible: bool) -> None:
    """SIGKILL before the rename leaves only a folder aside, which is swept."""
    died = subprocess.run([sys.executable, "-c", WRITE, str(tmp_path), point], check=False)
    assert died.returncode == -9
    names = [p.name for p in tmp_path.iterdir()]
    assert [not name.endswith(".new") for name in names] == [visible]


def test_an_altered_manifest_nobody_has_on_record_is_not_adopted(tmp_path: Path) -> None:
    """After a fall back the ledger no longer knows the damaged head's digest; the folder's name does."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint(3))
    assert [found.name for found, _ in folder.unrecorded([])] == [record.name]
    manifest = tmp_path / record.name / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"first_place":', '"first_place":1'))
    assert folder.unrecorded([]) == []


def test_a_claimed_checkpoint_is_out_of_reach_of_an_older_consumer(tmp_path: Path) -> None:
    """A sweep that began before it, and one that comes after, leave it alone; one that was first wins."""
    folder = CheckpointFolder(tmp_path, "run0")
    record = folder.write(checkpoint())
    claimed = folder.claim(record, 5)
    assert claimed is not None
    assert folder.sweep(set(), epoch=4) == []
    assert folder.unrecorded([]) == [(claimed, checkpoint())]
    assert folder.sweep(set(), epoch=5) == [claimed.name]
    assert folder.claim(claimed, 6) is None
