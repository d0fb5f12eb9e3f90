"""Bugs planted below checkpoints and feature slots, each with the check that must find it.

See testing/mutants.py for those of the protocol, testing/mutants_logs.py for those of the ref channel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from errno import EIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from paceline import durable_files
from paceline.errors import PacelineError
from paceline.features import codec
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing import broken_files, channel_history, checkpoint_history
from paceline.testing.flipped_files import flip_channels, flip_checkpoints, flip_features
from paceline.testing.mutants_changes import Mutant
from paceline.testing.mutants_logs import LOG_MUTANTS, nothing, only_of, without_fsync
from paceline.testing.recording_files import failing
from paceline.testing.simulated_parts import ViolationError
from paceline.training import checkpoint
from paceline.training.checkpoint import MANIFEST, CheckpointFolder

CHECKS: dict[str, Callable[[Path, int], Any]] = {
    "checkpoints and power": lambda place, seed: checkpoint_history.lose_power(
        place, seed, saves=4, per_point=1
    ),
    "checkpoints and failing calls": lambda place, seed: checkpoint_history.fail_every_call(
        place, seed, failing(EIO)
    ),
    "checkpoints and short writes": lambda place, seed: checkpoint_history.fail_every_call(
        place, seed, None, kinds=("write",)
    ),
    "checkpoints and flips": lambda place, seed: flip_checkpoints(place, seed, flips=12),
    "ledger and power": lambda place, seed: broken_files.lose_power(
        place, seed, "full", calls=12, per_interval=1
    ),
    "channel and power": lambda place, seed: channel_history.lose_power(place, seed, rounds=14, per_point=2),
    "channel and flips": lambda place, seed: flip_channels(place, seed, flips=20),
    "features and flips": lambda place, seed: flip_features(place, seed, flips=20),
}


def fsync_errors_ignored(real: Any) -> Any:
    def write_file(path: Path, data: bytes) -> None:
        fsync = os.fsync

        def ignored(fd: int) -> None:
            with suppress(OSError):
                fsync(fd)

        with patch.object(os, "fsync", ignored):
            real(path, data)

    return write_file


def one_write(_: Any) -> Any:
    def write_file(path: Path, data: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(fd, data)
        os.fsync(fd)
        os.close(fd)

    return write_file


def unsynced_claim(real: Any) -> Any:
    def claim(self: CheckpointFolder, record: Any, epoch: int) -> Any:
        with patch.object(durable_files, "sync_folder", lambda _: None):
            return real(self, record, epoch)

    return claim


def any_content(real: Any) -> Any:
    def read(self: CheckpointFolder, name: str, manifest: Any, *names: Any) -> Any:
        for file_name, expected in manifest["files"].items():
            content = (self.folder / name / file_name).read_bytes()
            expected.update(bytes=len(content), sha256=checkpoint._sha256(content))
        return real(self, name, manifest, *names)

    return read


def any_manifest(real: Any) -> Any:
    def read(self: CheckpointFolder, record: Any, *names: Any) -> Any:
        digest = checkpoint._sha256((self.folder / record.name / MANIFEST).read_bytes())
        return real(self, replace(record, manifest_digest=digest), *names)

    return read


def keeps_nothing(real: Any) -> Any:
    return lambda self, *_, **bound: real(self, set(), **bound)


def keeps(suffix: str) -> Callable[[Any], Any]:
    """`sweep` leaves the folders whose names end so."""

    def change(real: Any) -> Any:
        def sweep(self: CheckpointFolder, keep: set[str], *, epoch: int | None = None) -> Any:
            kept = {path.name for path in self.folder.iterdir() if path.suffix == suffix}
            return real(self, keep | kept, epoch=epoch)

        return sweep

    return change


def cleans_up_too_much(real: Any) -> Any:
    def write(self: CheckpointFolder, given: Any) -> Any:
        self.sweep({path.name for path in sorted(self.folder.iterdir())[1:]})  # room for the new one
        return real(self, given)

    return write


def errors_unexplained(real: Any) -> Any:
    def write(self: CheckpointFolder, given: Any) -> Any:
        with patch.object(checkpoint, "CheckpointError", lambda what, **_: OSError(what)):
            return real(self, given)

    return write


def same_attempt(_: Any) -> Any:
    return SimpleNamespace(uuid4=lambda: SimpleNamespace(hex="0" * 32))


def undigested(_: Any) -> Any:
    def get(self: SharedMemoryFeatureStore, ref: Any) -> Any:
        layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
        arena = self._attached()
        assert arena is not None
        slot, _ = arena.locate(ref)
        return codec.read(layout, codec.describe(ref.sample_id, layout), slot.payload)[0]

    return get


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "files not synced": (
        "checkpoints and power",
        Mutant("names of bytes that are not there", ((durable_files, "write_file", without_fsync),)),
    ),
    "failed sync ignored": (
        "checkpoints and failing calls",
        Mutant("bytes that never reach the disk", ((durable_files, "write_file", fsync_errors_ignored),)),
    ),
    "folders not synced": (
        "checkpoints and power",
        Mutant("bytes without a name", ((durable_files, "sync_folder", nothing),)),
    ),
    "files have no names": (
        "checkpoints and power",
        Mutant(
            "a checkpoint without its files",
            ((durable_files, "sync_folder", only_of(lambda folder: folder.suffix != ".new")),),
        ),
    ),
    "rename not synced": (
        "checkpoints and power",
        Mutant(
            "the ledger names what is gone",
            ((durable_files, "sync_folder", only_of(lambda folder: folder.name != "checkpoints")),),
        ),
    ),
    "folders above not synced": (
        "checkpoints and power",
        Mutant(
            "all checkpoints go at once",
            ((durable_files, "make_folder", lambda _: lambda path: path.mkdir(parents=True, exist_ok=True)),),
        ),
    ),
    "adopted unsynced": (
        "checkpoints and power",
        Mutant(
            "a dead writer's rename is lost",
            ((CheckpointFolder, "claim", unsynced_claim),),
        ),
    ),
    "short write": (
        "checkpoints and short writes",
        Mutant("the rest is never written", ((durable_files, "write_file", one_write),)),
    ),
    "file digests not checked": (
        "checkpoints and flips",
        Mutant("other weights", ((CheckpointFolder, "_read", any_content),)),
    ),
    "manifest not compared": (
        "checkpoints and flips",
        Mutant("another story", ((CheckpointFolder, "read", any_manifest),)),
    ),
    "adopted unjudged": (
        "checkpoints and flips",
        Mutant("an altered manifest is head", ((checkpoint, "DIGITS_IN_NAME", lambda _: 0),)),
    ),
    "sweep removes the recorded": (
        "checkpoints and power",
        Mutant("no way back", ((CheckpointFolder, "sweep", keeps_nothing),)),
    ),
    "sweep leaves the half-written": (
        "checkpoints and power",
        Mutant("the disk fills up", ((CheckpointFolder, "sweep", keeps(".new")),)),
    ),
    "sweep leaves the half-removed": (
        "checkpoints and power",
        Mutant("the disk fills up", ((CheckpointFolder, "sweep", keeps(checkpoint.GONE)),)),
    ),
    "old ones make room": (
        "checkpoints and power",
        Mutant("removed before it is replaced", ((CheckpointFolder, "write", cleans_up_too_much),)),
    ),
    "error without advice": (
        "checkpoints and failing calls",
        Mutant("a traceback", ((CheckpointFolder, "write", errors_unexplained),)),
    ),
    "one name for every attempt": (
        "checkpoints and failing calls",
        Mutant("no second attempt can succeed", ((checkpoint, "uuid", same_attempt),)),
    ),
    **LOG_MUTANTS,
    "features not digested": (
        "features and flips",
        Mutant("damage is trained", ((SharedMemoryFeatureStore, "get", undigested),)),
    ),
}


def kept(check: str, folder: Path, seed: int) -> None:
    """Make a check. What it promised to read and was refused is a violation, as what reads otherwise is.

    A crash of any other kind is none: it would say that a mutant broke, not that it was found.
    """
    try:
        CHECKS[check](folder, seed)
    except (PacelineError, OSError, ValueError) as error:
        raise ViolationError(f"{check}, seed {seed}: what was promised is refused: {error}") from error


def seeds_to_detect(name: str, folder: Path, seeds_max: int) -> int | None:
    """How many seeds its check needs to find the mutant; None if it survives them all."""
    check, mutant = MUTANTS[name]
    for seed in range(seeds_max):
        with mutant.planted():
            try:
                kept(check, folder / f"seed-{seed}", seed)
            except AssertionError:
                return seed + 1
    return None
