"""Bugs planted below the ref channel, replaced files and the ledger's log; see mutants_files.py."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from paceline import durable_files
from paceline.errors import PacelineError
from paceline.ledger import streaming_channel
from paceline.ledger.stores.sqlite.database import Database
from paceline.ledger.stores.sqlite.group_sync import ANNOUNCED, GroupSync
from paceline.ledger.streaming_channel import StreamingRefChannel, _Tail
from paceline.testing.mutants import Mutant


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


def noted_before_synced(_: Any) -> Any:
    def wait_for(self: GroupSync, lsn: int) -> None:
        with self.alone:
            if self._noted() < lsn:
                self._note(max(lsn, self._said(ANNOUNCED)))
                self._sync()

    return wait_for


def notes_what_came_since(_: Any) -> Any:
    def wait_for(self: GroupSync, lsn: int) -> None:
        with self.alone:
            if self._noted() < lsn:
                self._sync()
                self._note(max(lsn, self._said(ANNOUNCED)))

    return wait_for


class Log:
    """As far as changes were committed to it, and as far as it is on the disk; some syncs fail."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.committed = self.on_disk = 0

    def sync(self) -> None:
        if self.rng.random() < 0.2:
            raise OSError("injected")
        self.on_disk = self.committed
        self.others_commit(self.rng.randint(0, 2))  # meanwhile

    def opened(self, place: Path) -> GroupSync:
        """By somebody who writes all of it again if nobody vouches for it."""
        (place / "ledger.db").touch()
        self.group = GroupSync(place / "gate", self.sync)
        with self.group.alone:
            self.group.enter(place / "ledger.db", self._write_again)
        return self.group

    def others_commit(self, number: int) -> None:
        """And wait for the disk."""
        self.committed += number
        self.group.announce(self.committed)

    def _write_again(self, _: int) -> None:
        self.on_disk = self.committed

    def lose_power(self) -> None:
        """Or a copy is put back, which may be older."""
        self.committed = self.on_disk = self.rng.randint(0, self.on_disk)


def share_syncs(place: Path, seed: int) -> None:
    """The check of group sync alone: whoever asks for a change gets it onto the disk or an error."""
    place.mkdir(parents=True)
    log = Log(random.Random(seed))
    group = log.opened(place)
    for _ in range(60):
        log.others_commit(1)
        lsn = log.rng.randint(1, log.committed)
        with suppress(OSError, PacelineError):
            group.wait_for(lsn)
            assert log.on_disk >= lsn, f"seed {seed}: change {lsn} is not on the disk, but the call returned"
        if log.rng.random() < 0.1:
            group.close()
            log.lose_power()
            group = log.opened(place)
    group.close()


LOG_MUTANTS: dict[str, tuple[str, Mutant]] = {
    "log not synced": (
        "ledger and power",
        Mutant("acknowledged calls are gone", ((Database, "_sync_log", nothing),)),
    ),
    "sync noted before it is made": (
        "shared syncs",
        Mutant("a failed sync covers the next call", ((GroupSync, "wait_for", noted_before_synced),)),
    ),
    "sync covers what came during it": (
        "shared syncs",
        Mutant("commits during a sync are not synced", ((GroupSync, "wait_for", notes_what_came_since),)),
    ),
    "note of a sync never cleared": (
        "shared syncs",
        Mutant(
            "the last life's syncs are believed",
            ((GroupSync, "_nobody_else_is_here", lambda _: lambda _: False),),
        ),
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
