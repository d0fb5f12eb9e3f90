"""Telemetry is for looking at: whole lines, torn ones left out, frequent ones not echoed each time."""

from __future__ import annotations

from pathlib import Path

from paceline.telemetry import EventLog, read_events


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
