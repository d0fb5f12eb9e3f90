"""A SQLite file layer that records every write, makes it fail, or loses it in a power failure.

`RecordingVFS` keeps the writes, truncations and syncs of the database and its write-ahead log, in order.
`images` are the files as a power failure may leave them: everything synced is there, and of what was not
synced since, any part: nothing, all, a prefix, a random subset (reordered), the last write torn. The
wal-index is memory and is gone. `FaultyVFS` fails the n-th call of a kind. What the system itself reads or
writes short SQLite's own layer below completes, so at this one a short write has stored a part and failed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

TEARS = (512, 4096)
RECORDED = ("write", "truncate", "sync")


@dataclass(frozen=True)
class Event:
    """One operation on one file. `data` is None for a truncation to `offset`, and for a sync."""

    file: str
    kind: str  # write | truncate | sync | mark; not recorded: open | read | lock | size | delete
    offset: int = 0
    data: bytes | None = None
    note: Any = None


class RecordingVFS(apsw.VFS):
    """Registered under its name while it lives."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.events: list[Event] = []
        super().__init__(name, "unix")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 (SQLite's names)
        self.meets(Event("", "open"))
        return _RecordingFile(self, name, flags)

    def xDelete(self, name: str, sync_folder: bool) -> None:  # noqa: N802
        self.meets(Event("", "delete"))
        super().xDelete(name, sync_folder)

    def mark(self, note: Any) -> None:
        """Note that the program has come to a point (a call returned)."""
        self.events.append(Event("", "mark", note=note))

    def meets(self, event: Event) -> type[Exception] | None:
        """What to raise once half of the write is done, if anything."""
        if event.kind in RECORDED:
            self.events.append(event)
        return None


class _RecordingFile(apsw.VFSFile):
    def __init__(self, vfs: RecordingVFS, name: Any, flags: list[int]) -> None:
        self._vfs = vfs
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._file = Path(path).name if path else ""
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        error = self._vfs.meets(Event(self._file, "write", offset, bytes(data)))
        if error is not None:
            super().xWrite(data[: len(data) // 2], offset)
            raise error("injected")
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self._vfs.meets(Event(self._file, "truncate", size))
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._vfs.meets(Event(self._file, "sync"))
        super().xSync(flags)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self._vfs.meets(Event(self._file, "read", offset))
        return super().xRead(amount, offset)

    def xLock(self, level: int) -> None:  # noqa: N802
        self._vfs.meets(Event(self._file, "lock"))
        super().xLock(level)

    def xFileSize(self) -> int:  # noqa: N802
        self._vfs.meets(Event(self._file, "size"))
        return super().xFileSize()


class FaultyVFS(RecordingVFS):
    """Fails the call that `arm` names; everything before and after works."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._error: type[Exception] | None = None
        self._kinds: tuple[str, ...] = ()
        self._left = 0
        self._lasting = False
        self.struck = False

    def arm(self, error: type[Exception], kinds: tuple[str, ...], turn: int, *, lasting: bool) -> None:
        """The `turn`-th call (from 1) of these kinds raises; with `lasting`, all later ones, too.

        The kind "short write" is a write that stores half of the bytes before it raises.
        """
        self._error, self._kinds, self._left, self._lasting = error, kinds, turn, lasting
        self.struck = False

    def xSleep(self, microseconds: int) -> int:  # noqa: N802
        """Whoever waits for a lock that is injected waits in vain, so at once."""
        return microseconds

    def disarm(self) -> None:
        self._error = None

    def meets(self, event: Event) -> type[Exception] | None:
        short = event.kind == "write" and "short write" in self._kinds
        if self._error is None or (event.kind not in self._kinds and not short):
            return None
        self._left -= 1
        if self._left != 0 and not (self._lasting and self._left < 0):
            return None
        self.struck = True
        if short:
            return self._error
        raise self._error("injected")


Files = dict[str, bytearray]


def apply(files: Files, event: Event, data: bytes | None = None) -> None:
    """Do to `files` what the event did (or `data`, a part of what it wrote)."""
    held = files.setdefault(event.file, bytearray())
    if event.kind == "truncate":
        del held[event.offset :]
    elif event.kind == "write":
        written = event.data if data is None else data
        assert written is not None
        if len(held) < event.offset:
            held.extend(bytes(event.offset - len(held)))
        held[event.offset : event.offset + len(written)] = written


def images(
    events: list[Event], rng: random.Random, *, per_interval: int, synced: Files
) -> Iterator[tuple[int, Files]]:
    """(number of events that had happened, files) for power failures all along the recording.

    `synced`: what is certainly on the disk before it.
    """
    synced = _copy(synced)
    waiting: list[Event] = []  # written, not synced
    for happened, event in enumerate(events, start=1):
        if event.kind == "mark":
            continue
        if event.kind != "sync":
            waiting.append(event)
            continue
        for _ in range(per_interval):
            yield happened - 1, _image(synced, waiting[: rng.randint(0, len(waiting))], rng)
        for done in [w for w in waiting if w.file == event.file]:
            apply(synced, done)
        waiting = [w for w in waiting if w.file != event.file]
        yield happened, _copy(synced)
    for _ in range(per_interval):
        yield len(events), _image(synced, waiting, rng)


def _copy(files: Files) -> Files:
    return {name: bytearray(data) for name, data in files.items()}


def _image(synced: Files, waiting: list[Event], rng: random.Random) -> Files:
    files = _copy(synced)
    way = rng.choice(("all", "none", "subset", "reordered", "torn"))
    chosen = [] if way == "none" else list(waiting)
    if way in ("subset", "reordered"):
        chosen = [event for event in chosen if rng.random() < 0.6]
    if way == "reordered":
        rng.shuffle(chosen)
    for event in chosen:
        if way == "torn" and event is chosen[-1] and event.data:
            tear = rng.choice(TEARS)
            apply(files, event, event.data[: rng.randint(0, max(1, len(event.data) // tear)) * tear])
        else:
            apply(files, event)
    return files
