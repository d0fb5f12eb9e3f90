"""The exports by server: each has a layout for every method whose drafts it loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.errors import ConfigError
from paceline.exports import blocks, eagle3
from paceline.exports.export import Export, ExportedDraft, FolderContent
from paceline.exports.reader.replay import Replay, ServedTarget, Verdict


@dataclass(frozen=True)
class ServerExport:
    """`layouts`: by the method's name."""

    server: str
    layouts: Mapping[str, Export]

    def build(self, draft: ExportedDraft) -> FolderContent:
        return self._layout(draft.method).build(draft)

    def check(self, folder: Path, target: ServedTarget, replays: Sequence[Replay]) -> Verdict:
        config = json.loads((folder / "config.json").read_text())
        return self._layout(config["paceline"]["method"]).check(folder, target, replays)

    def _layout(self, method: str) -> Export:
        if method not in self.layouts:
            raise ConfigError(
                f"A draft of the method {method!r} cannot be exported for {self.server}.",
                why=f"{self.server} loads drafts of these methods: {', '.join(self.layouts)}.",
                next="choose another export, or install a package that offers one for this method.",
            )
        return self.layouts[method]


VLLM = ServerExport("vllm", {"eagle3": eagle3.VLLM, "p-eagle": eagle3.VLLM, **blocks.layouts("vllm")})
SGLANG = ServerExport("sglang", {"eagle3": eagle3.SGLANG, **blocks.layouts("sglang")})
HF = ServerExport("hf", {"eagle3": eagle3.HF, **blocks.layouts("hf")})
SPECULATORS = ServerExport("speculators", {"eagle3": eagle3.SPECULATORS, "p-eagle": eagle3.SPECULATORS})
