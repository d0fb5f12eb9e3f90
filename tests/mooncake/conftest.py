"""Runs here start their commands from nothing: a forked process could not use Mooncake's threads.

A session that passed leaves a record: benchmarks/results/DATE-mooncake.json.
"""

from collections import Counter

import pytest

from benchmarks.record import commit, keep
from paceline.features.stores.mooncake.link import installed_version
from paceline.testing.run_fixtures import memory_of_runs_is_freed, tiny_model

__all__ = ["memory_of_runs_is_freed", "tiny_model"]

KILLS: Counter[str] = Counter()
PASSED: list[str] = []


@pytest.fixture
def kills() -> Counter[str]:
    """Who was killed how often, for the record."""
    return KILLS


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        PASSED.append(report.nodeid)


def pytest_sessionfinish(exitstatus: int) -> None:
    if exitstatus == 0 and KILLS:
        told = {"commit": commit(), "mooncake": installed_version(), "kills": dict(KILLS), "passed": PASSED}
        keep("mooncake", told)
