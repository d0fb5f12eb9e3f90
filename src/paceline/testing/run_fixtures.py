"""Fixtures of tests of whole runs, for a conftest to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.testing.forked_commands import ForkedCommands
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun, begun, executed


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny target for all runs."""
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(scope="session", autouse=True)
def commands_are_forks(forked_commands: ForkedCommands) -> Iterator[None]:
    """For one that is started from nothing there are `executed` and `begun` of tiny_run.py."""
    TinyRun.execute, TinyRun.begin = staticmethod(forked_commands.run), staticmethod(forked_commands.begin)
    yield
    TinyRun.execute, TinyRun.begin = staticmethod(executed), staticmethod(begun)


@pytest.fixture(autouse=True)
def memory_of_runs_is_freed() -> Iterator[None]:
    """Also of a test's runs that never come to their end."""
    before = len(TinyRun.made)
    yield
    for run in TinyRun.made[before:]:
        run.free()
