"""Telemetry is for looking at: whole lines, torn ones left out, frequent ones not echoed each time."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from paceline import telemetry
from paceline.telemetry import EventLog, NewEvents, read_events


def test_events_come_back_and_torn_lines_do_not(tmp_path: Path) -> None:
    """A crash in the middle of a line loses that line alone."""
    log = EventLog(tmp_path / "events" / "e.jsonl")
    log.write("step", step=1, loss=2.5)
    log.write("step", step=2, loss=2.25)
    log.close()
    path = tmp_path / "events" / "e.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert [event["step"] for event in read_events(path)] == [1]
    assert read_events(tmp_path / "none") == []


def test_frequent_events_are_echoed_now_and_then(tmp_path: Path) -> None:
    """A role in the foreground shows that it works without drowning the terminal."""
    lines: list[str] = []
    log = EventLog(tmp_path / "e.jsonl", echo=lines.append)
    for step in range(50):
        log.write("step", step=step, loss=1 / 3)
    log.write("checkpoint", step=50)
    log.close()
    assert lines == ["step: step 0, loss 0.3333\n", "checkpoint: step 50\n"]
    assert len(read_events(tmp_path / "e.jsonl")) == 51


def test_nothing_fails_because_telemetry_cannot_be_written(tmp_path: Path) -> None:
    """A full disk, a folder in its place, a terminal that is gone: the role's own error counts, not this."""

    def echo(_: str) -> None:
        raise OSError("no space left")

    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "fifo.jsonl")
    for path in (
        Path("/dev/full"),
        tmp_path / "folder.jsonl",
        tmp_path / "fifo.jsonl",
        Path("/proc/none/e.jsonl"),
    ):
        log = EventLog(path, echo=echo)
        log.write("step", step=1)
        log.close()


def test_events_do_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail is kept, in whole lines, and goes on."""
    monkeypatch.setattr(telemetry, "FILE_BYTES_MAX", 4000)
    monkeypatch.setattr(telemetry, "TAIL_BYTES", 1000)
    log = EventLog(tmp_path / "e.jsonl")
    for step in range(1000):
        log.write("step", step=step)
    log.close()
    assert (tmp_path / "e.jsonl").stat().st_size <= 4000
    steps = [event["step"] for event in read_events(tmp_path / "e.jsonl")]
    assert steps == list(range(steps[0], 1000))
    assert len(steps) > 10


def test_what_is_no_event_is_left_out(tmp_path: Path) -> None:
    """Another program's bytes, nested beyond reason, or a number of very many digits."""
    path = tmp_path / "e.jsonl"
    lines = [b"\xff\x00", b"[" * 100_000, b"[1]", b'{"event": ' + b"9" * 5000 + b"}", b'{"event": "step"}']
    path.write_bytes(b"\n".join(lines))
    assert read_events(path, tail_bytes=1 << 20) == [{"event": "step"}]


def test_new_events_are_read_once_and_whole(tmp_path: Path) -> None:
    """From the first look on; a line that is half written is read when it is whole."""
    path = tmp_path / "e.jsonl"
    log = EventLog(path)
    log.write("step", step=1)
    news = NewEvents(path)
    assert news.read() == []
    log.write("step", step=2)
    with path.open("ab") as file:
        file.write(b'{"event": "no')
    assert [event["step"] for event in news.read()] == [2]
    assert news.read() == []
    with path.open("ab") as file:
        file.write(b'te"}\n')
    assert news.read() == [{"event": "note"}]
    assert NewEvents(tmp_path / "missing").read() == []


def test_an_echoed_event_cannot_command_the_terminal(tmp_path: Path) -> None:
    """It carries ids and reasons from outside."""
    lines: list[str] = []
    EventLog(tmp_path / "e.jsonl", echo=lines.append).write("quarantined", sample_id="\x1b[2J\nsound")
    assert lines == ["quarantined: sample_id \\x1b[2J\\nsound\n"]


def test_every_event_that_is_written_is_listed() -> None:
    """And nothing is listed that no role writes: the list is what a reader of events can rely on."""
    written = {"step", "error"}
    for path in (Path(telemetry.__file__).parent).rglob("*.py"):
        if "testing" not in path.parts:
            written |= set(re.findall(r"(?:report|events\.write)\(\s*\"(\w+)\"", path.read_text()))
    assert written == set(telemetry.EVENTS)
