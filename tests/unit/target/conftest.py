from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from paceline.testing.tiny_folder import make_tiny_folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))
