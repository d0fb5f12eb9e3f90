"""A run made by hand, for the checker's tests."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.testing.run_by_hand import RunByHand


@pytest.fixture
def by_hand(tmp_path: Path) -> RunByHand:
    """An empty run of twelve prompts."""
    return RunByHand(tmp_path / "by-hand")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for a store in real shared memory."""
    path = Path(f"/dev/shm/paceline-test-{uuid.uuid4().hex}")
    yield path
    shutil.rmtree(path, ignore_errors=True)
