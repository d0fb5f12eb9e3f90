"""Durable checkpoints: written aside, fsynced, renamed; damaged ones are found, not trusted.

A checkpoint is a folder of safetensors files and a manifest that names each with its digest,
together with the run, the step and the place in the committed log. The folder appears under its
name only when every byte is on disk. It becomes the head by `MetadataStore.record_checkpoint`,
never by being there: a crash before that leaves a folder nobody refers to, which is swept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from paceline.crashpoints import reach
from paceline.errors import CheckpointError
from paceline.ledger.store import CheckpointRecord

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors by file ("draft", "optimizer", ...) and small JSON values."""

    step: int
    last_seq: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    values: Mapping[str, Any]


class CheckpointFolder:
    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, checkpoint: Checkpoint) -> CheckpointRecord:
        """Durable on return. Raises CheckpointError if the disk is full; older checkpoints stay."""
        name = f"step-{checkpoint.step:08d}-{uuid.uuid4().hex[:8]}"
        aside = self.folder / f"{name}.new"
        try:
            aside.mkdir()
            digest = self._fill(aside, checkpoint)
            _sync(aside)
            reach("checkpoint.before_rename")
            aside.rename(self.folder / name)
            _sync(self.folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"The checkpoint of step {checkpoint.step} could not be written to {self.folder} ({error}).",
                why="The checkpoint before it is untouched, and no feature it does not cover was freed.",
                next="free space on that disk and run the same command again.",
            ) from error
        reach("checkpoint.after_rename")
        return CheckpointRecord(checkpoint.step, name, digest, checkpoint.last_seq)

    def _fill(self, aside: Path, checkpoint: Checkpoint) -> str:
        files = {}
        for name, tensors in checkpoint.tensors.items():
            data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
            _write_durably(aside / f"{name}.safetensors", data)
            files[f"{name}.safetensors"] = {"bytes": len(data), "sha256": _sha256(data)}
        manifest = {
            "format_version": FORMAT_VERSION,
            "run_id": self.run_id,
            "step": checkpoint.step,
            "last_seq": checkpoint.last_seq,
            "values": dict(checkpoint.values),
            "files": files,
        }
        data = json.dumps(manifest, indent=1, sort_keys=True).encode()
        _write_durably(aside / MANIFEST, data)
        return _sha256(data)

    def read(self, record: CheckpointRecord) -> Checkpoint:
        """Raises CheckpointError if anything differs from what was written."""
        folder = self.folder / record.name
        try:
            data = (folder / MANIFEST).read_bytes()
            if _sha256(data) != record.manifest_digest:
                raise self._damaged(record, "its manifest does not match the ledger's digest")
            manifest = json.loads(data)
            tensors = {}
            for file_name, expected in manifest["files"].items():
                content = (folder / file_name).read_bytes()
                if len(content) != expected["bytes"] or _sha256(content) != expected["sha256"]:
                    raise self._damaged(record, f"{file_name} does not match its digest")
                tensors[file_name.removesuffix(".safetensors")] = load(content)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise self._damaged(record, str(error)) from error
        if manifest["run_id"] != self.run_id or manifest["format_version"] != FORMAT_VERSION:
            raise self._damaged(record, "it belongs to another run or another version")
        return Checkpoint(manifest["step"], manifest["last_seq"], tensors, manifest["values"])

    def _damaged(self, record: CheckpointRecord, what: str) -> CheckpointError:
        return CheckpointError(
            f"Checkpoint {record.name} of step {record.step} is missing or damaged: {what}.",
            why="Training on from it would give other weights.",
            next="run the same command again; it falls back to the checkpoint before.",
        )

    def sweep(self, keep: set[str]) -> list[str]:
        """Remove every folder that is not in `keep`: half-written, never recorded or retired."""
        swept = []
        for entry in sorted(self.folder.iterdir()):
            if entry.is_dir() and entry.name.startswith("step-") and entry.name not in keep:
                shutil.rmtree(entry)
                swept.append(entry.name)
        return swept


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
