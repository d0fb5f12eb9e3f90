"""Every target engine runs the one suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.engines.engine import TargetEngine
from paceline.engines.transformers import TransformersEngine
from paceline.testing.engine_suite import EngineSuite
from paceline.testing.tiny_folder import make_tiny_folder


class TestTransformersEngine(EngineSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = make_tiny_folder(tmp_path / "model")

    def make(self) -> TargetEngine:
        return TransformersEngine(self.folder, dtype="float32")
