"""What a role reports while it works: one JSON object a line, for people and for the supervisor.

Telemetry is for looking at. Nothing is decided by it and nothing is recovered from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ECHO_S = 5.0
TELL_S = 1.0


class EventLog:
    """Appends events to one file. A line is written whole or, after a crash, torn at the end."""

    def __init__(self, path: Path, *, echo: Callable[[str], object] | None = None) -> None:
        """`echo` gets a readable line of each event, of frequent ones not more than one in 5 seconds."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._echo = echo
        self._echoed: dict[str, float] = {}

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n")
        self._file.flush()
        now = time.monotonic()
        if self._echo is not None and now - self._echoed.get(event, -ECHO_S) >= ECHO_S:
            self._echoed[event] = now
            self._echo(_readable(event, fields) + "\n")

    def close(self) -> None:
        self._file.close()


class BlockedTime:
    """How long this process has waited for the other role; told while it waits, once a second at most.

    with blocked:
        while not ready():
            blocked.waiting()
            sleep_until_something_changes()
    """

    def __init__(self, report: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0
        self._report = report
        self._clock = clock
        self._counted_to: float | None = None  # of the wait that goes on
        self._told = 0.0
        self._told_at = -TELL_S

    def waiting(self) -> None:
        """Nothing can be done now. The first of these calls begins the wait, each one counts it so far."""
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


def read_events(path: Path, *, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """The events of a file, oldest first; only of its last `tail_bytes` if given. Torn lines are left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - tail_bytes) if tail_bytes else 0)
            data = file.read()
    except FileNotFoundError:
        return []
    events = []
    for line in data.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            events.append(record)
    return events
