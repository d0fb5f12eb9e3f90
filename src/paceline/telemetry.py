"""The events that a role reports while it works: one JSON object per line, for people and the supervisor.

No decision and no recovery depends on telemetry, and nothing fails because it cannot be written: a full disk
costs its lines, not the run. Its files are kept short.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from paceline.regular_files import open_regular
from paceline.terminal import one_line

ECHO_S = 5.0
TELL_S = 1.0
FILE_BYTES_MAX = 8 << 20
TAIL_BYTES = 1 << 20  # the tail that is kept of a longer file
READ_BYTES = 1 << 16  # how much `read_events` reads

EVENTS = {
    # every role
    "role_started": "a process of the role began, with its pid",
    "role_ended": "it ended by itself, or was asked to stop (`stopped`)",
    "error": "it ended with this error and exit code",
    "blocked": "it waits for the other role; seconds so far",
    "idle": "a producer waits for its turn, since others hold the next prompts; seconds so far",
    # producer
    "engine_ready": "the target is loaded and was probed",
    "started": "the producer took its role: orphans that it freed, samples that are lost",
    "note": "what a person should know about the prompts or the engine",
    "server": "the engine's server: started, waited for, ready again, or ended as a leftover",
    "group": "a capture group is committed; seconds for it, and all seconds of waiting for room",
    "group_failed": "prompts failed, or a group as a whole, and why; `failed`: how many for good",
    "taken_over": "another producer's work: it was not heard of, or holds a group for too long",
    "made_room": "later samples were freed, for one that the consumer waits for",
    "finished": "every prompt is committed or failed",
    # consumer
    "ranks": "so many ranks train, and so many did `before` (0: none); another number sums in another order; "
    "`sharded`: each holds a part of the weights",
    "first_weights": "so many samples are there, and the draft's first weights are made from them",
    "resumed": "training goes on after the checkpoint of this step",
    "step": "a step is trained: its figures, seconds of fetching and of training, seconds blocked in all",
    "step_failed": "a step raised; isolation looks for its culprits",
    "quarantined": "a sample is never trained (again), and why",
    "waiting_for_recapture": "a sample cannot be read; the producer is to capture it again",
    "checkpoint": "a checkpoint is head; seconds for it, and seconds that training waited for it",
    "checkpoint_damaged": "a recorded checkpoint is missing or damaged",
    "fall_back": "an older checkpoint is head; samples that the producer captures again",
    "rolled_forward": "a complete checkpoint that the ledger did not know is head",
    # evaluator
    "measured": "a prompt is measured: how many are, of how many, and of what",
    "evaluated": "the acceptance lengths",
    "evaluated_suites": "a report on suites is written",
    # comparer
    "replayed": "so many steps of a variant are trained on kept samples",
    "measuring": "a variant is trained and is measured now",
    # exporter
    "answers_exported": "the kept answers of the run are written to a file",
    "exported": "a folder for inference servers is written and has passed its self-check",
}  # every event and its meaning; the call that writes it decides its fields


class EventLog:
    """Appends events to one file. A line is written whole or, after a crash or an error, torn."""

    def __init__(self, path: Path, *, echo: Callable[[str], object] | None = None) -> None:
        """`echo` gets a readable line per event, for frequent events at most one every 5 seconds.

        An error is not among them: the process that ends with it prints it whole.
        """
        self._path = path
        self._echo = echo
        self._echoed: dict[str, float] = {}
        self._fd = -1
        self._torn = True  # an earlier process may have left a torn line
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(path, flags, 0o644)

    def write(self, event: str, **fields: Any) -> None:
        """Append an event. Errors of the disk or the terminal are ignored."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        with suppress(OSError):
            if self._fd >= 0:
                line = (json.dumps(record) + "\n").encode()
                data = b"\n" + line if self._torn else line
                self._torn = True
                self._torn = os.write(self._fd, data) < len(data)
                shorten(self._path)
        now = time.monotonic()
        if self._echo is not None and event != "error" and now - self._echoed.get(event, -ECHO_S) >= ECHO_S:
            self._echoed[event] = now
            with suppress(OSError):
                self._echo(one_line(_readable(event, fields)) + "\n")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def shorten(path: Path) -> None:
    """Cut an append-only file that has grown too long to its tail. Raises OSError.

    The file is cut in place, so a process that has it open goes on appending at its end.
    """
    if path.stat().st_size <= FILE_BYTES_MAX:
        return
    tail = _tail(path, TAIL_BYTES).partition(b"\n")[2]
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.pwrite(fd, tail, 0)
        os.ftruncate(fd, len(tail))
    finally:
        os.close(fd)


class BlockedTime:
    """How long this process has waited for the other role; reported at most once a second.

    with blocked:
        while not ready():
            blocked.waiting()
            sleep_until_something_changes()
    """

    def __init__(self, report: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0
        self._report = report
        self._clock = clock
        self._counted_to: float | None = None  # of the current wait
        self._told = 0.0
        self._told_at = -TELL_S

    def waiting(self) -> None:
        """Call while the process cannot go on: the first call begins the wait, each adds the time so far."""
        self._count(self._clock())

    def __enter__(self) -> BlockedTime:
        return self

    def __exit__(self, *_: object) -> None:
        if self._counted_to is not None:
            self._count(self._clock())
            self._counted_to = None

    def _count(self, now: float) -> None:
        self.seconds += 0.0 if self._counted_to is None else now - self._counted_to
        self._counted_to = now
        if self.seconds > self._told and now - self._told_at >= TELL_S:
            self._told, self._told_at = self.seconds, now
            self._report("blocked", blocked_seconds=self.seconds)


def _readable(event: str, fields: dict[str, Any]) -> str:
    numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in fields.items()}
    return f"{event}: " + ", ".join(f"{name} {value}" for name, value in numbers.items())


def read_events(path: Path, *, tail_bytes: int = READ_BYTES) -> list[dict[str, Any]]:
    """The newest events of a file, oldest first. Lines that are not events are left out."""
    return events_of(read_tail(path, tail_bytes))


def events_of(data: bytes) -> list[dict[str, Any]]:
    """The events in lines of a file. Lines that are not events are left out."""
    events = []
    for line in data.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            events.append(record)
    return events


class NewEvents:
    """The events that are appended to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """Those since the last call; none if the file cannot be read, or was shortened meanwhile."""
        data = b""
        with suppress(OSError), open_regular(self._path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(min(self._at, size))
            data = file.read(READ_BYTES)
            whole = data.rpartition(b"\n")[0]
            self._at = min(self._at, size) + len(whole) + bool(whole)
            return events_of(whole)
        return []


def read_tail(path: Path, num_bytes: int) -> bytes:
    """The end of a file; empty if it cannot be read."""
    try:
        return _tail(path, num_bytes)
    except OSError:
        return b""


def _tail(path: Path, num_bytes: int) -> bytes:
    with open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
        return file.read(num_bytes)
