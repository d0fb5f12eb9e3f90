"""Every target engine runs the one suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.engines.engine import TargetEngine
from paceline.engines.settings import EngineRun
from paceline.engines.sglang.engine import SglangEngine
from paceline.engines.sglang.settings import SglangSection
from paceline.engines.sglang.sink import FOLDER_VARIABLE
from paceline.engines.transformers import TransformersEngine
from paceline.engines.vllm.engine import VllmEngine
from paceline.engines.vllm.settings import VllmSection
from paceline.target.settings import TargetSection
from paceline.testing.engine_suite import EngineSuite
from paceline.testing.sglang_server import SglangServer
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.vllm_server import VllmServer
from paceline.types import Feature, States


class TestTransformersEngine(EngineSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = make_tiny_folder(tmp_path / "model")

    def make(self) -> TargetEngine:
        return TransformersEngine(self.folder, dtype="float32")


class TestSglangEngine(EngineSuite):
    """With the plug-in, on stand-ins for the parts of the server that it hooks."""

    @pytest.fixture(autouse=True)
    def _server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "sink"))
        self.folder = make_tiny_folder(tmp_path / "model")
        self.server = SglangServer(self.folder, (1, 4))
        self.engines: list[SglangEngine] = []
        with self.server.stand_in.plugged():
            self.server.stand_in.start()
            self.server.start()
            yield
            for engine in self.engines:
                engine.close()
            self.server.stop()
            self.server.stand_in.flush()

    def make(self) -> TargetEngine:
        section = SglangSection(url=self.server.url, directory=self.folder.parent / "sink")
        run = EngineRun(
            features=lambda facts: (Feature("s", States((1, 4, 8)), dtype=facts.dtype),),
            directory=self.folder.parent / "run",
            files=lambda: self.folder.parent,
        )
        engine = SglangEngine(section, TargetSection(model=self.folder, dtype="float32"), run)
        self.engines.append(engine)
        return engine


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
