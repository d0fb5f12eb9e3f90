"""The simulation of many hosts agrees with the formula of `paceline plan --hosts` where one part binds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.at_scale import BASE, formula, marks, roomy
from benchmarks.record import RESULTS
from benchmarks.simulated_hosts import Simulated, simulate
from paceline.roles.at_scale import GBIT, LEDGERS

SHORT = replace(BASE, samples=20_480, marks=marks(1000), interval=10)
TINY = replace(SHORT, sample_bytes=1e4, marks=roomy(), group_s=1 / 16, step_s=1 / 64)


def rows(name: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads((RESULTS / name).read_text())["rows"]}


@pytest.mark.parametrize(
    ("shape", "binds", "within"),
    [
        (replace(SHORT, producers=16), "capture", 0.03),
        (replace(SHORT, step_s=8.0), "training", 0.03),
        (replace(SHORT, passes=3), "training", 0.05),
        (replace(SHORT, host_rate=2.5 * GBIT), "network", 0.05),
        (replace(SHORT, storage_rate=75 * GBIT), "storage", 0.1),
        (replace(SHORT, samples=10_240, marks=marks(125)), "window", 0.2),
        (TINY, "ledger", 0.2),
    ],
)
def test_where_one_part_binds_the_simulation_agrees(shape: Simulated, binds: str, within: float) -> None:
    """Only the window costs more than the formula says: producers wait for a checkpoint, too."""
    expected, least = formula(shape)
    assert least == binds
    found = simulate(shape)
    assert found.rate == pytest.approx(expected, rel=within)


def test_the_same_simulation_gives_the_same_figures() -> None:
    shape = replace(SHORT, samples=4096)
    assert simulate(shape) == simulate(shape)
    assert simulate(shape) != simulate(replace(shape, seed=1))


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_no_room_is_left_taken_and_no_visit_left_out(passes: int) -> None:
    """With a budget in which producers wait all the time."""
    from benchmarks.simulated_hosts import Run

    run = Run(replace(SHORT, samples=4100, passes=passes, marks=marks(125)))
    told = run.go()
    assert sum(number for _, number in told.trained_at) == 4100 * passes
    assert run.settled == run.groups
    assert run.block_of(4100 * passes) == run.groups
    assert 0 <= run.resident <= run.shape.marks.budget_bytes


@pytest.mark.parametrize("batch", [32, 256])
def test_the_ledgers_costs_are_those_that_were_measured(batch: int) -> None:
    """A file: both processes' rate, a sample being two refs. A server: its processor's time for a sample."""
    file = rows("2026-11-29-benchmarks.json")[f"NORMAL, producer + consumer, batch {batch}"]
    assert LEDGERS["sqlite"].of_a_sample(batch, batch, 1) == pytest.approx(2 / file["value"], rel=0.05)
    server = rows("2026-11-29-producers.json")[f"Valkey, everysec, producer + consumer, batch {batch}"]
    found = re.search(r"append-only file\) \d+ \+ (\d+) us", server["note"])
    assert found
    assert LEDGERS["redis"].of_a_sample(batch, batch, 1) == pytest.approx(int(found[1]) * 1e-6, rel=0.05)


def test_the_simulation_is_as_right_as_the_record_says() -> None:
    """Beside every rate that was measured with real processes."""
    [*_, newest] = sorted(RESULTS.glob("*-at-scale.json"))
    report = json.loads(newest.read_text())
    checks = [one for one in report["rows"] if one["module"] == "validation"]
    assert len(checks) == 6
    assert report["worst_error"] == max(abs(one["ratio"] - 1) for one in checks)
    assert report["worst_error"] < 0.15
