"""Shared memory for the feature store tests."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for a store in real shared memory."""
    path = Path(f"/dev/shm/paceline-test-{uuid.uuid4().hex}")
    yield path
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
