from __future__ import annotations

from pathlib import Path

import pytest

from paceline.testing.tiny_folder import make_tiny_folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny target for all runs."""
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")
