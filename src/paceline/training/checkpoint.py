"""Durable checkpoints: written aside, fsynced, renamed; and recognised when they are damaged.

A checkpoint is a folder of files and a manifest. The manifest names each file with its digest, and holds
the run, the step and the lineage: which steps trained which samples since the checkpoint before. The folder
gets its name only when every byte is on the disk. It becomes the head by a call of the ledger, not by its
presence. A crash before that call leaves an unrecorded folder: recovery adopts it if it continues the head,
else it is swept. No torch here: files are bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline import durable_files
from paceline.crashpoints import reach
from paceline.durable_files import FileContent
from paceline.errors import CheckpointDamagedError, CheckpointError
from paceline.ledger.records import CheckpointRecord, TrainedSample, TrainedStep
from paceline.parts import whole_name

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{8,}-\d{6,}-[0-9a-f]+")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
GONE = ".gone"  # suffix of a folder that is being removed
NOT_AS_WRITTEN = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    AttributeError,
    ValueError,
    LookupError,
    TypeError,
)
DIGITS_IN_NAME = 16  # of the manifest's digest, for a reader without a record of the folder


@dataclass(frozen=True)
class FileEntry:
    """A manifest's entry for one file."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: files by name ("draft.safetensors", ...) and small JSON values.

    The files of a checkpoint on the disk are read and checked again at each access. `lineage`: the steps
    since the checkpoint `previous`; `chain`: the hash of the whole lineage; `epoch` and `lsn`: the
    consumer's epoch and the ledger's log number when it was written; `first_place`: where a consumer that
    resumes from it begins to read the log; `ledger`: which ledger that was, "" if it had no identity.
    """

    step: int
    first_place: int
    files: Mapping[str, FileContent]
    values: Mapping[str, Any]
    lineage: tuple[TrainedStep, ...] = ()
    previous: str = ""
    chain: str = ""
    epoch: int = 0
    lsn: int = 0
    ledger: str = ""


class CheckpointFolder:
    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id
        try:
            durable_files.make_folder(folder)
        except OSError as error:
            raise self._disk_fails("given a folder", error) from error

    # -- writing ---------------------------------------------------------------------------

    def write(self, checkpoint: Checkpoint) -> CheckpointRecord:
        """Write the files aside, then the manifest, then give the folder its name. Durable on return.

        Raises CheckpointError if the disk is full; older checkpoints stay.
        """
        aside = self.set_aside(checkpoint.step, checkpoint.epoch)
        with self._writing(aside, removes=True):
            entries = self._write_files(aside, checkpoint.files)
        return self.seal(aside, checkpoint, entries)

    def set_aside(self, step: int, epoch: int) -> str:
        """Make the folder into which the files of a checkpoint are written, and return its name.

        Several processes may write files into it. Raises CheckpointError, as the next two do.
        """
        aside = f"step-{step:08d}-{epoch:06d}-{uuid.uuid4().hex[:8]}.new"  # unlike every earlier attempt
        with self._writing(aside):
            (self.folder / aside).mkdir(mode=0o700)
        return aside

    def write_files(self, aside: str, files: Mapping[str, FileContent]) -> dict[str, FileEntry]:
        """Write files into a folder that was set aside, durably; their entries for its manifest.

        If it fails, `discard` the folder.
        """
        with self._writing(aside):
            entries = self._write_files(aside, files)
            durable_files.sync_folder(self.folder / aside)  # their names, which this host has made
        return entries

    def _write_files(self, aside: str, files: Mapping[str, FileContent]) -> dict[str, FileEntry]:
        entries = {}
        for name, content in files.items():
            durable_files.write_file(self.folder / aside / name, content)
            entries[name] = FileEntry(name, len(content), _sha256(content))
            reach("checkpoint.after_file")
        return entries

    def seal(
        self,
        aside: str,
        checkpoint: Checkpoint,
        own: Mapping[str, FileEntry],
        others: Mapping[str, FileEntry] | None = None,
    ) -> CheckpointRecord:
        """Write the manifest of a folder that holds these files, and give the folder its name.

        `own`: of this process; `others`: of other ones, which must be seen here. If it fails, the folder is
        removed.
        """
        entries = {**own, **(others or {})}
        reach("checkpoint.before_manifest")
        with self._writing(aside, removes=True):
            folder = self.folder / aside
            for entry in (others or {}).values():
                if (folder / entry.name).stat().st_size != entry.num_bytes:
                    raise OSError(f"{entry.name} has not the size that was written")
            data = self._manifest(checkpoint, entries)
            durable_files.write_file(folder / MANIFEST, data)
            digest = _sha256(data)
            name = f"{folder.stem}{digest[:DIGITS_IN_NAME]}"
            durable_files.sync_folder(folder)
            reach("checkpoint.before_rename")
            folder.rename(self.folder / name)
            reach("checkpoint.before_sync")
            durable_files.sync_folder(self.folder)
        return CheckpointRecord(checkpoint.step, name, digest, checkpoint.chain, checkpoint.first_place)

    def discard(self, aside: str) -> None:
        """Remove a folder that was set aside and is not going to be sealed, as far as the disk allows."""
        shutil.rmtree(self.folder / aside, ignore_errors=True)

    @contextmanager
    def _writing(self, aside: str, *, removes: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if removes:
                self.discard(aside)
            raise CheckpointError(
                f"The checkpoint of step {int(aside.split('-')[1])} could not be written to {self.folder} "
                f"({error}).",
                why="The checkpoint before it is untouched, and only features that it covers were freed.",
                next="free space on that disk and run the same command again.",
            ) from error

    def _manifest(self, checkpoint: Checkpoint, entries: Mapping[str, FileEntry]) -> bytes:
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "run_id": self.run_id,
            "step": checkpoint.step,
            "first_place": checkpoint.first_place,
            "previous": checkpoint.previous,
            "chain": checkpoint.chain,
            "epoch": checkpoint.epoch,
            "lsn": checkpoint.lsn,
            "lineage": [_step_to_json(trained) for trained in checkpoint.lineage],
            "values": dict(checkpoint.values),
            "files": {
                name: {"bytes": entry.num_bytes, "sha256": entry.sha256} for name, entry in entries.items()
            },
        }
        if checkpoint.ledger:
            manifest["ledger"] = checkpoint.ledger
        return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()

    # -- reading ---------------------------------------------------------------------------

    def read(self, record: CheckpointRecord, names: Collection[str] | None = None) -> Checkpoint:
        """Read a checkpoint, and compare the files `names`, or their parts, with their digests (None: all).

        Raises CheckpointDamagedError if anything differs from what was written, CheckpointError if the
        disk or this process fails, so that damage cannot be told.
        """
        try:
            if not NAME.fullmatch(record.name):
                raise self._damaged(record.name, "this is not a checkpoint's name")
            data = (self.folder / record.name / MANIFEST).read_bytes()
            if _sha256(data) != record.manifest_digest:
                raise self._damaged(record.name, "its manifest does not match the ledger's digest")
            return self._read(record.name, json.loads(data), names)
        except NOT_AS_WRITTEN as error:
            raise self._damaged(record.name, str(error)) from error
        except OSError as error:
            raise self._disk_fails("read", error) from error

    def open(self, name: str, manifest_digest: str) -> Checkpoint:
        """A checkpoint whose files are compared with their digests when they are read. Raises as `read`."""
        return self.read(CheckpointRecord(0, name, manifest_digest), names=())

    def _read(self, name: str, manifest: dict[str, Any], names: Collection[str] | None) -> Checkpoint:
        if manifest["run_id"] != self.run_id or manifest["format_version"] != FORMAT_VERSION:
            raise self._damaged(name, "it belongs to another run or another version")
        entries = {
            file_name: FileEntry(file_name, entry["bytes"], entry["sha256"])
            for file_name, entry in manifest["files"].items()
        }
        for entry in entries.values():
            if not FILE_NAME.fullmatch(entry.name):
                raise self._damaged(name, f"it names a file {entry.name!r}")
            if names is None or whole_name(entry.name) in names:
                self._check(name, entry)
        return Checkpoint(
            manifest["step"],
            manifest["first_place"],
            _Files(self, name, entries),
            manifest["values"],
            tuple(_step_from_json(step) for step in manifest["lineage"]),
            manifest["previous"],
            manifest["chain"],
            manifest["epoch"],
            manifest["lsn"],
            manifest.get("ledger", ""),
        )

    def _check(self, name: str, entry: FileEntry) -> None:
        """Compare a file with its entry, without loading it whole."""
        with (self.folder / name / entry.name).open("rb") as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        self._compare(name, entry, size, digest)

    def _compare(self, name: str, entry: FileEntry, size: int, digest: str) -> None:
        if (size, digest) != (entry.num_bytes, entry.sha256):
            raise self._damaged(name, f"{entry.name} does not match its digest")

    def read_file(self, name: str, entry: FileEntry) -> bytes:
        """The bytes of one file of the checkpoint `name`. Raises as `read` does."""
        try:
            content = (self.folder / name / entry.name).read_bytes()
        except NOT_AS_WRITTEN as error:
            raise self._damaged(name, str(error)) from error
        except OSError as error:
            raise self._disk_fails("read", error) from error
        self._compare(name, entry, len(content), _sha256(content))
        return content

    def unrecorded(self, records: Collection[CheckpointRecord]) -> list[tuple[CheckpointRecord, Checkpoint]]:
        """Undamaged checkpoints that no record names, by step.

        They are left by a crash between the rename and the ledger's record, or belong to a newer ledger.
        Claim one before the ledger adopts it: its name may not be durable yet. Raises CheckpointError.
        """
        known = {record.name for record in records}
        found = []
        for entry in sorted(self.folder.iterdir()):
            if not NAME.fullmatch(entry.name) or entry.name in known:
                continue
            try:
                data = (entry / MANIFEST).read_bytes()
                if not entry.name.endswith(_sha256(data)[:DIGITS_IN_NAME]):
                    continue  # changed since it got its name
                checkpoint = self._read(entry.name, json.loads(data), None)
            except (*NOT_AS_WRITTEN, CheckpointDamagedError):
                continue  # damaged and unrecorded: it will be swept
            except OSError as error:
                raise self._disk_fails("read", error) from error
            record = CheckpointRecord(
                checkpoint.step, entry.name, _sha256(data), checkpoint.chain, checkpoint.first_place
            )
            found.append((record, checkpoint))
        return sorted(found, key=lambda pair: pair[0].step)

    # -- claiming and removing -------------------------------------------------------------

    def claim(self, record: CheckpointRecord, epoch: int) -> CheckpointRecord | None:
        """Rename an unrecorded checkpoint to a name of `epoch`, durably; None if it is gone.

        Afterwards no older consumer's sweep can remove it, even one that has begun. Raises
        CheckpointError if the disk fails.
        """
        name = f"step-{record.step:08d}-{epoch:06d}-{identity_of(record.name)}"
        try:
            (self.folder / record.name).rename(self.folder / name)
            reach("checkpoint.after_claim")
            durable_files.sync_folder(self.folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._disk_fails("renamed", error) from error
        return replace(record, name=name)

    def _damaged(self, name: str, what: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(
            f"Checkpoint {name} is missing or damaged: {what}.",
            why="Going on from it would give other weights.",
            next="run the same command again; it falls back to the checkpoint before.",
        )

    def _disk_fails(self, verb: str, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"The checkpoints in {self.folder} could not be {verb} ({error}).",
            why="An unreadable checkpoint is not treated as damaged, and nothing is removed.",
            next="check that disk and run the same command again; if one file stays unreadable, move its "
            "checkpoint's folder away, and training goes on from the one before.",
        )

    def sweep(self, keep: set[str], *, epoch: int | None = None) -> list[str]:
        """Remove every folder that is not in `keep`: half-written, unrecorded or retired ones.

        With `epoch`, only folders of that epoch and earlier: a replaced consumer must not remove what its
        successor has written. Raises CheckpointError if the disk fails.
        """
        swept = []
        for entry in sorted(self.folder.iterdir()):
            is_ours = entry.name.startswith("step-") and (entry.is_symlink() or entry.is_dir())
            if not is_ours or entry.name in keep:
                continue
            if epoch is None or epoch_of(entry.name) <= epoch:
                try:
                    with suppress(FileNotFoundError):  # a successor may sweep it at the same time
                        _remove(entry)
                except OSError as error:
                    raise self._disk_fails("swept", error) from error
                swept.append(entry.name)
        return swept


class _Files(Mapping[str, FileContent]):
    """The files of a checkpoint on the disk, each read at access."""

    def __init__(self, folder: CheckpointFolder, name: str, entries: Mapping[str, FileEntry]) -> None:
        self._folder = folder
        self._name = name
        self._entries = entries

    def __getitem__(self, name: str) -> bytes:
        return self._folder.read_file(self._name, self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _remove(folder: Path) -> None:
    """Rename the folder first, so that a replaced consumer cannot add files during the removal.

    If the folder was moved to another disk, only the link to it is removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    gone = folder.with_suffix(GONE)
    if folder != gone:
        folder.rename(gone)
        reach("checkpoint.after_set_aside")
    shutil.rmtree(gone)


def identity_of(name: str) -> str:
    """The part of a folder's name that a claim keeps: its attempt and its digest."""
    return name.rpartition("-")[2]


def epoch_of(name: str) -> int:
    """The epoch of the consumer that wrote the folder; 0 for any other name."""
    parts = name.removesuffix(".new").removesuffix(GONE).split("-")
    return int(parts[2]) if len(parts) == 4 and parts[2].isdecimal() else 0


def _step_to_json(trained: TrainedStep) -> list[Any]:
    samples = [[s.place, s.sample_id, s.ordinal, s.finished] for s in trained.samples]
    return [trained.step, trained.rev, samples]


def _step_from_json(value: list[Any]) -> TrainedStep:
    step, rev, samples = value
    return TrainedStep(step, rev, tuple(TrainedSample(*sample) for sample in samples))


def _sha256(data: FileContent) -> str:
    return hashlib.sha256(data).hexdigest()
