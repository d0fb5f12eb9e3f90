"""A place for thousands of small files."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in shared memory: no test waits for the disk."""
    path = Path(f"/dev/shm/paceline-test-{uuid.uuid4().hex}")
    path.mkdir()
    yield path
    shutil.rmtree(path)
