"""The record of the long suites keeps what it is not told anew."""

from __future__ import annotations

import json
from pathlib import Path

from reliability.record import record


def test_a_suite_replaces_its_own_record_and_no_other(tmp_path: Path) -> None:
    """And says which; every record has its own origin, and the totals are those of all."""
    path = tmp_path / "reliability.json"
    first = [
        {"suite": "simulation", "seed": 0, "seconds": 5, "counts": {"runs": 100}},
        {"suite": "kill_schedules", "seed": 0, "seconds": 9, "counts": {"schedules": 7}},
    ]
    assert record(first, 1.0, path) == []
    again = {"suite": "simulation", "seed": 3, "error": "AssertionError"}
    [replaced] = record([again], 0.5, path)
    assert replaced.startswith("simulation: the record of ")
    assert replaced.endswith("scale 1, seed 0)")
    kept = json.loads(path.read_text())
    assert (kept["violations"], kept["violated"], kept["seconds"]) == (1, ["simulation"], 9)
    kills, simulation = kept["suites"]
    assert (kills["seed"], kills["scale"], kills["counts"]) == (0, 1.0, {"schedules": 7})
    assert (simulation["seed"], simulation["scale"], simulation["error"]) == (3, 0.5, "AssertionError")
    assert all(suite["date"] and suite["machine"] and "commit" in suite for suite in kept["suites"])
    record([{"suite": "simulation", "seed": 3, "seconds": 5, "counts": {}}], 0.5, path)
    assert json.loads(path.read_text())["violations"] == 0
