"""Bugs planted below the ref channel, replaced files and the ledger's log; see mutants_files.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from paceline import durable_files
from paceline.compat import streaming_channel
from paceline.compat.streaming_channel import StreamingRefChannel, _Tail
from paceline.ledger.stores.sqlite.database import Database
from paceline.testing.mutants_changes import Mutant


def nothing(_: Any) -> Any:
    return lambda *_: None


def without_fsync(real: Any) -> Any:
    """The same call, but what it syncs is not."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with patch.object(os, "fsync", lambda _: None):
            return real(*args, **kwargs)

    return call


def only_of(wanted: Callable[[Path], bool]) -> Callable[[Any], Any]:
    """`sync_folder` for some folders only."""

    def change(real: Any) -> Any:
        def sync_folder(folder: Path) -> None:
            if wanted(folder):
                real(folder)

        return sync_folder

    return change


def in_place(_: Any) -> Any:
    def replace_file(path: Path, data: bytes) -> None:
        durable_files.write_file(path, data)
        durable_files.sync_folder(path.parent)

    return replace_file


def named_before_synced(_: Any) -> Any:
    def replace_file(path: Path, data: bytes) -> None:
        aside = path.with_name(path.name + ".new")
        without_fsync(durable_files.write_file)(aside, data)
        aside.rename(path)
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
        durable_files.sync_folder(path.parent)

    return replace_file


def glued(real: Any) -> Any:
    return lambda fd, data: real(fd, data.removeprefix(b"\n"))


def glued_if_it_looks_whole(real: Any) -> Any:
    def write_all(fd: int, data: bytes) -> None:
        whole = data.startswith(b"\n") and os.pread(fd, 1, os.fstat(fd).st_size - 1) == b"\n"
        real(fd, data[whole:])

    return write_all


def ends_no_past(real: Any) -> Any:
    return lambda start, end: real(start, end) if start < end else b""


def never_full(_: Any) -> Any:
    return lambda *_: None


LOG_MUTANTS: dict[str, tuple[str, Mutant]] = {
    "log not synced": (
        "ledger and power",
        Mutant("acknowledged calls are gone", ((Database, "_sync_commits", never_full),)),
    ),
    "replaced in place": (
        "channel and power",
        Mutant("half a file", ((durable_files, "replace_file", in_place),)),
    ),
    "renamed before it is synced": (
        "channel and power",
        Mutant("an empty file", ((durable_files, "replace_file", named_before_synced),)),
    ),
    "replaced without a sync of the folder": (
        "channel and power",
        Mutant(
            "the old file comes back",
            (
                (
                    durable_files,
                    "sync_folder",
                    only_of(lambda folder: not (folder / "evaluation.json").exists()),
                ),
            ),
        ),
    ),
    "refs not synced": (
        "channel and power",
        Mutant("published refs are gone", ((StreamingRefChannel, "publish_many", without_fsync),)),
    ),
    "ref checksums not checked": (
        "channel and power",
        Mutant("torn refs are read", ((streaming_channel, "_checksum", lambda _: lambda _: b"00000000"),)),
    ),
    "fragments glue": (
        "channel and power",
        Mutant("a published ref is unreadable", ((streaming_channel, "_write_all", glued),)),
    ),
    "a tail that looks whole is trusted": (
        "channel and power",
        Mutant(
            "after a failed fsync it is not", ((streaming_channel, "_write_all", glued_if_it_looks_whole),)
        ),
    ),
    "damaged refs are dropped": (
        "channel and flips",
        Mutant("published refs are missed in silence", ((_Tail, "_is_torn", lambda _: lambda *_: True),)),
    ),
    "a writer does not end the past": (
        "channel and power",
        Mutant("refs wait behind a torn one", ((streaming_channel, "_note", ends_no_past),)),
    ),
    "channel has no name": (
        "channel and power",
        Mutant("the whole channel is gone", ((streaming_channel, "sync_folder", nothing),)),
    ),
}
