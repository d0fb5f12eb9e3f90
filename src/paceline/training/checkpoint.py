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
import shutil
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline import durable_files
from paceline.crashpoints import reach
from paceline.durable_files import FileContent
from paceline.errors import CheckpointDamagedError, CheckpointError
from paceline.ledger.records import CheckpointRecord, TrainedSample, TrainedStep

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 has no lineage
MANIFEST = "manifest.json"
GONE = ".gone"  # ends the name of a folder that is being removed
NOT_AS_WRITTEN = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    ValueError,
    LookupError,
    TypeError,
)
DIGITS_IN_NAME = 16  # of the manifest's digest, for who finds the folder without a record of it


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: files by name ("draft.safetensors", ...) and small JSON values.

    `lineage`: the steps since the checkpoint called `previous`; `chain`: the hash of the whole
    lineage; `epoch` and `lsn`: the consumer's epoch and the ledger's log number when it was written.
    """

    step: int
    last_seq: int
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

    def write(self, checkpoint: Checkpoint) -> CheckpointRecord:
        """Durable on return. Raises CheckpointError if the disk is full; older checkpoints stay."""
        prefix = f"step-{checkpoint.step:08d}-{checkpoint.epoch:06d}"
        attempt = uuid.uuid4().hex[:8]  # the name of no earlier attempt at the same checkpoint
        aside = self.folder / f"{prefix}-{attempt}.new"
        try:
            aside.mkdir()
            digest = self._fill(aside, checkpoint)
            name = f"{prefix}-{attempt}{digest[:DIGITS_IN_NAME]}"
            durable_files.sync_folder(aside)
            reach("checkpoint.before_rename")
            aside.rename(self.folder / name)
            reach("checkpoint.before_sync")
            durable_files.sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"The checkpoint of step {checkpoint.step} could not be written to {self.folder} ({error}).",
                why="The checkpoint before it is untouched, and no feature it does not cover was freed.",
                next="free space on that disk and run the same command again.",
            ) from error
        return CheckpointRecord(checkpoint.step, name, digest, checkpoint.last_seq, checkpoint.chain)

    def _fill(self, aside: Path, checkpoint: Checkpoint) -> str:
        files = {}
        for file_name, content in checkpoint.files.items():
            durable_files.write_file(aside / file_name, content)
            reach("checkpoint.after_file")
            files[file_name] = {"bytes": len(content), "sha256": _sha256(content)}
        manifest = {
            "format_version": FORMAT_VERSION,
            "run_id": self.run_id,
            "step": checkpoint.step,
            "last_seq": checkpoint.last_seq,
            "previous": checkpoint.previous,
            "chain": checkpoint.chain,
            "epoch": checkpoint.epoch,
            "lsn": checkpoint.lsn,
            "lineage": [_step_to_json(trained) for trained in checkpoint.lineage],
            "values": dict(checkpoint.values),
            "files": files,
        }
        data = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
        durable_files.write_file(aside / MANIFEST, data)
        return _sha256(data)

    def read(self, record: CheckpointRecord) -> Checkpoint:
        """Raises CheckpointDamagedError if anything differs from what was written, CheckpointError if
        that cannot be told because the disk or this process fails."""
        folder = self.folder / record.name
        try:
            data = (folder / MANIFEST).read_bytes()
            if _sha256(data) != record.manifest_digest:
                raise self._damaged(record.name, "its manifest does not match the ledger's digest")
            return self._read(record.name, json.loads(data))
        except NOT_AS_WRITTEN as error:
            raise self._damaged(record.name, str(error)) from error
        except OSError as error:
            raise self._disk_fails("read", error) from error

    def _read(self, name: str, manifest: dict[str, Any]) -> Checkpoint:
        if manifest["run_id"] != self.run_id or manifest["format_version"] not in READABLE_VERSIONS:
            raise self._damaged(name, "it belongs to another run or another version")
        files = {}
        for file_name, expected in manifest["files"].items():
            content = (self.folder / name / file_name).read_bytes()
            if len(content) != expected["bytes"] or _sha256(content) != expected["sha256"]:
                raise self._damaged(name, f"{file_name} does not match its digest")
            files[file_name] = content
        return Checkpoint(
            manifest["step"],
            manifest["last_seq"],
            files,
            manifest["values"],
            tuple(_step_from_json(step) for step in manifest.get("lineage", [])),
            manifest.get("previous", ""),
            manifest.get("chain", ""),
            manifest.get("epoch", 0),
            manifest.get("lsn", 0),
        )

    def unrecorded(self, records: Collection[CheckpointRecord]) -> list[tuple[CheckpointRecord, Checkpoint]]:
        """Whole, undamaged checkpoints that none of `records` names, by step: what a crash between
        the rename and the ledger's record leaves, or a ledger older than its checkpoints. To be claimed
        before the ledger adopts one: its name may not be on the disk yet. Raises CheckpointError."""
        known = {record.name for record in records}
        found = []
        for entry in sorted(self.folder.iterdir()):
            if not entry.name.startswith("step-") or entry.suffix or entry.name in known:
                continue
            try:
                data = (entry / MANIFEST).read_bytes()
                if not entry.name.endswith(_sha256(data)[:DIGITS_IN_NAME]):
                    continue  # altered since it was named
                checkpoint = self._read(entry.name, json.loads(data))
            except (*NOT_AS_WRITTEN, CheckpointDamagedError):
                continue  # damaged, and nobody's: swept
            except OSError as error:
                raise self._disk_fails("read", error) from error
            record = CheckpointRecord(
                checkpoint.step, entry.name, _sha256(data), checkpoint.last_seq, checkpoint.chain
            )
            found.append((record, checkpoint))
        return sorted(found, key=lambda pair: pair[0].step)

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
            if not entry.is_dir() or not entry.name.startswith("step-") or entry.name in keep:
                continue
            if epoch is None or epoch_of(entry.name) <= epoch:
                try:
                    with suppress(FileNotFoundError):  # its successor may sweep the same
                        _remove(entry)
                except OSError as error:
                    raise self._disk_fails("swept", error) from error
                swept.append(entry.name)
        return swept


def _remove(folder: Path) -> None:
    """Under another name first: whoever was taken over while it filled the folder finds it no more."""
    gone = folder.with_suffix(GONE)
    if folder != gone:
        folder.rename(gone)
        reach("checkpoint.after_set_aside")
    shutil.rmtree(gone)


def identity_of(name: str) -> str:
    """What of a folder's name stays when a later consumer claims it: its attempt and its digest."""
    return name.rpartition("-")[2]


def epoch_of(name: str) -> int:
    """The epoch of the consumer that wrote the folder of this name; 0 in names of version 1."""
    parts = name.removesuffix(".new").removesuffix(GONE).split("-")
    return int(parts[2]) if len(parts) == 4 and parts[2].isdecimal() else 0


def _step_to_json(trained: TrainedStep) -> list[Any]:
    samples = [[s.seq, s.sample_id, s.task_id, s.finished] for s in trained.samples]
    return [trained.step, trained.rev, trained.last_seq, samples]


def _step_from_json(value: list[Any]) -> TrainedStep:
    step, rev, last_seq, samples = value
    return TrainedStep(step, rev, last_seq, tuple(TrainedSample(*sample) for sample in samples))


def _sha256(data: FileContent) -> str:
    return hashlib.sha256(data).hexdigest()
