"""Every target engine runs the one suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.engines.engine import TargetEngine
from paceline.engines.settings import EngineRun
from paceline.engines.transformers import TransformersEngine
from paceline.engines.vllm.engine import VllmEngine
from paceline.engines.vllm.settings import VllmSection
from paceline.target.settings import TargetSection
from paceline.testing.engine_suite import EngineSuite
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.vllm_server import VllmServer
from paceline.types import Feature, States


class TestTransformersEngine(EngineSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = make_tiny_folder(tmp_path / "model")

    def make(self) -> TargetEngine:
        return TransformersEngine(self.folder, dtype="float32")


class TestVllmEngine(EngineSuite):
    """Against a server that speaks vLLM's HTTP and answers one request at a time, so its bits repeat."""

    @pytest.fixture(autouse=True)
    def _server(self, tmp_path: Path) -> Iterator[None]:
        self.folder = make_tiny_folder(tmp_path / "model")
        self.server = VllmServer(self.folder, tmp_path / "states", (1, 4, 8)).start()
        self.engines: list[VllmEngine] = []
        yield
        for engine in self.engines:
            engine.close()
        self.server.stop()

    def make(self) -> TargetEngine:
        section = VllmSection(url=self.server.url, directory=self.server.folder)
        run = EngineRun(
            features=lambda facts: (Feature("s", States((1, 4)), dtype=facts.dtype),),
            directory=self.folder.parent / "run",
            files=lambda: self.server.folder,
        )
        engine = VllmEngine(section, TargetSection(model=self.folder, dtype="float32"), run)
        self.engines.append(engine)
        return engine
