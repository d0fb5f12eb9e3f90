"""Fixtures of tests of whole runs, for a conftest to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.testing.forked_commands import ForkedCommands
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun, executed


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny target for all runs."""
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(scope="session", autouse=True)
def forked_commands() -> Iterator[None]:
    """Commands that a test waits for are forks; those that it starts, to disturb them, are not."""
    with ForkedCommands() as commands:
        TinyRun.execute = staticmethod(commands.run)
        yield
    TinyRun.execute = staticmethod(executed)


@pytest.fixture(autouse=True)
def memory_of_runs_is_freed() -> Iterator[None]:
    """Also of a test's runs that never come to their end."""
    before = len(TinyRun.made)
    yield
    for run in TinyRun.made[before:]:
        run.free()
