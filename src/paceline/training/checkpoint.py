"""Durable checkpoints: written aside, fsynced, renamed; damaged ones are found, not trusted.

A checkpoint is a folder of files and a manifest that names each with its digest, together with the
run, the step and the lineage: which steps trained which samples since the checkpoint before. The
folder appears under its name only when every byte is on disk. It becomes the head by
`MetadataStore.record_checkpoint`, never by being there. A crash before that leaves a folder that
nobody refers to: a ledger it continues may adopt it, else it is swept. No torch here: files are bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline import durable_files
from paceline.crashpoints import reach
from paceline.durable_files import FileContent
from paceline.errors import CheckpointDamagedError, CheckpointError
from paceline.ledger.records import CheckpointRecord, TrainedSample, TrainedStep

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{8,}-\d{6,}-[0-9a-f]+")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
GONE = ".gone"  # ends the name of a folder that is being removed
NOT_AS_WRITTEN = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    AttributeError,
    ValueError,
    LookupError,
    TypeError,
)
DIGITS_IN_NAME = 16  # of the manifest's digest, for a reader that has no record of the folder


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint, as its manifest has it."""

    name: str
    num_bytes: int
    sha256: str


class Aside:
    """The folder of a checkpoint that has begun: every rank puts its files there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, name: str, content: FileContent) -> FileEntry:
        """On the disk on return; the entry is for `CheckpointFolder.finish`. Raises OSError."""
        durable_files.write_file(self.path / name, content)
        reach("checkpoint.after_file")
        return FileEntry(name, len(content), _sha256(content))


Fill = Callable[[Aside], Iterable[FileEntry]]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: files by name ("draft.safetensors", ...) and small JSON values.

    Files of one that was read are read, and checked again, when they are asked for. `lineage`: the steps
    since the checkpoint called `previous`; `chain`: the hash of the whole lineage; `epoch` and `lsn`: the
    consumer's epoch and the ledger's log number when it was written; `first_place`: where a consumer that
    resumes from it begins to read the log.
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


class CheckpointFolder:
    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id
        try:
            durable_files.make_folder(folder)
        except OSError as error:
            raise self._disk_fails("found a place", error) from error

    # -- writing ---------------------------------------------------------------------------

    def write(self, checkpoint: Checkpoint, fill: Fill | None = None) -> CheckpointRecord:
        """Begun, filled, finished. Durable on return.

        `fill` puts the files and returns their entries; None: the checkpoint's own are put. Raises
        CheckpointError if the disk is full; older checkpoints stay.
        """
        files = checkpoint.files
        fill = fill or (lambda aside: [aside.put(name, content) for name, content in files.items()])
        aside: Aside | None = None
        try:
            aside = self.begin(checkpoint)
            return self.finish(aside, checkpoint, fill(aside))
        except OSError as error:
            if aside is not None:
                shutil.rmtree(aside.path, ignore_errors=True)
            raise CheckpointError(
                f"The checkpoint of step {checkpoint.step} could not be written to {self.folder} ({error}).",
                why="The checkpoint before it is untouched, and no feature it does not cover was freed.",
                next="free space on that disk and run the same command again.",
            ) from error

    def begin(self, checkpoint: Checkpoint) -> Aside:
        """A new folder aside, for every rank to put its files in. Raises OSError."""
        prefix = f"step-{checkpoint.step:08d}-{checkpoint.epoch:06d}"
        aside = Aside(self.folder / f"{prefix}-{uuid.uuid4().hex[:8]}.new")  # the name of no earlier attempt
        aside.path.mkdir(mode=0o700)
        return aside

    def finish(self, aside: Aside, checkpoint: Checkpoint, entries: Iterable[FileEntry]) -> CheckpointRecord:
        """The manifest last, and then the name. Raises OSError."""
        data = self._manifest(checkpoint, entries)
        durable_files.write_file(aside.path / MANIFEST, data)
        digest = _sha256(data)
        name = f"{aside.path.stem}{digest[:DIGITS_IN_NAME]}"
        durable_files.sync_folder(aside.path)
        reach("checkpoint.before_rename")
        aside.path.rename(self.folder / name)
        reach("checkpoint.before_sync")
        durable_files.sync_folder(self.folder)
        return CheckpointRecord(checkpoint.step, name, digest, checkpoint.chain, checkpoint.first_place)

    def _manifest(self, checkpoint: Checkpoint, entries: Iterable[FileEntry]) -> bytes:
        manifest = {
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
            "files": {entry.name: {"bytes": entry.num_bytes, "sha256": entry.sha256} for entry in entries},
        }
        return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()

    # -- reading ---------------------------------------------------------------------------

    def read(self, record: CheckpointRecord, names: Collection[str] | None = None) -> Checkpoint:
        """The checkpoint, with these of its files compared to their digests (None: with all).

        Raises CheckpointDamagedError if anything differs from what was written, CheckpointError if
        that cannot be told because the disk or this process fails.
        """
        try:
            if not NAME.fullmatch(record.name):
                raise self._damaged(record.name, "no checkpoint has such a name")
            data = (self.folder / record.name / MANIFEST).read_bytes()
            if _sha256(data) != record.manifest_digest:
                raise self._damaged(record.name, "its manifest does not match the ledger's digest")
            return self._read(record.name, json.loads(data), names)
        except NOT_AS_WRITTEN as error:
            raise self._damaged(record.name, str(error)) from error
        except OSError as error:
            raise self._disk_fails("read", error) from error

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
            if names is None or entry.name in names:
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
        )

    def _check(self, name: str, entry: FileEntry) -> None:
        """Compare a file with its entry, without holding its bytes."""
        with (self.folder / name / entry.name).open("rb") as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        self._compare(name, entry, size, digest)

    def _compare(self, name: str, entry: FileEntry, size: int, digest: str) -> None:
        if (size, digest) != (entry.num_bytes, entry.sha256):
            raise self._damaged(name, f"{entry.name} does not match its digest")

    def read_file(self, name: str, entry: FileEntry) -> bytes:
        """The bytes of one file of the checkpoint called `name`. Raises as `read` does."""
        try:
            content = (self.folder / name / entry.name).read_bytes()
        except NOT_AS_WRITTEN as error:
            raise self._damaged(name, str(error)) from error
        except OSError as error:
            raise self._disk_fails("read", error) from error
        self._compare(name, entry, len(content), _sha256(content))
        return content

    def unrecorded(self, records: Collection[CheckpointRecord]) -> list[tuple[CheckpointRecord, Checkpoint]]:
        """Whole, undamaged checkpoints that none of `records` names, by step: what a crash between
        the rename and the ledger's record leaves, or a ledger older than its checkpoints. To be claimed
        before the ledger adopts one: its name may not be on the disk yet. Raises CheckpointError."""
        known = {record.name for record in records}
        found = []
        for entry in sorted(self.folder.iterdir()):
            if not NAME.fullmatch(entry.name) or entry.name in known:
                continue
            try:
                data = (entry / MANIFEST).read_bytes()
                if not entry.name.endswith(_sha256(data)[:DIGITS_IN_NAME]):
                    continue  # altered since it was named
                checkpoint = self._read(entry.name, json.loads(data), None)
            except (*NOT_AS_WRITTEN, CheckpointDamagedError):
                continue  # damaged, and in no record: swept
            except OSError as error:
                raise self._disk_fails("read", error) from error
            record = CheckpointRecord(
                checkpoint.step, entry.name, _sha256(data), checkpoint.chain, checkpoint.first_place
            )
            found.append((record, checkpoint))
        return sorted(found, key=lambda pair: pair[0].step)

    # -- claiming and removing -------------------------------------------------------------

    def claim(self, record: CheckpointRecord, epoch: int) -> CheckpointRecord | None:
        """Put the folder of an unrecorded checkpoint under a name of `epoch`, durably; None if it is gone.

        From then on no older consumer's sweep can remove it, not even one that has begun. Raises
        CheckpointError if the disk refuses.
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
            why="Training on from it would give other weights.",
            next="run the same command again; it falls back to the checkpoint before.",
        )

    def _disk_fails(self, verb: str, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"The checkpoints in {self.folder} could not be {verb} ({error}).",
            why="Paceline takes none of them for damaged because of that, and removes nothing.",
            next="check that disk and run the same command again; if one file stays unreadable, move its "
            "checkpoint's folder away, and training goes on from the one before.",
        )

    def sweep(self, keep: set[str], *, epoch: int | None = None) -> list[str]:
        """Remove every folder that is not in `keep`: half-written, never recorded or retired.

        With `epoch`, only those of that consumer's epoch and earlier ones: a consumer that was taken
        over must not remove what its successor has written since it looked at the ledger. Raises
        CheckpointError if the disk refuses.
        """
        swept = []
        for entry in sorted(self.folder.iterdir()):
            is_ours = entry.name.startswith("step-") and (entry.is_symlink() or entry.is_dir())
            if not is_ours or entry.name in keep:
                continue
            if epoch is None or epoch_of(entry.name) <= epoch:
                try:
                    with suppress(FileNotFoundError):  # its successor may sweep the same
                        _remove(entry)
                except OSError as error:
                    raise self._disk_fails("swept", error) from error
                swept.append(entry.name)
        return swept


class _Files(Mapping[str, FileContent]):
    """The files of a checkpoint on the disk, each read when it is asked for."""

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
    """Under another name first: a consumer that was replaced while it filled the folder finds it no more.

    Of a folder that was moved to another disk only the link is ours to remove.
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
    """What of a folder's name stays when a later consumer claims it: its attempt and its digest."""
    return name.rpartition("-")[2]


def epoch_of(name: str) -> int:
    """The epoch of the consumer that wrote the folder of this name; 0 of any other name."""
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
