"""EAGLE-3 drafts for vLLM, SGLang and speculators: one writer, three layouts of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.exports.config import flat_config, speculators_config
from paceline.exports.contract import expected, refuse_others
from paceline.exports.export import ExportedDraft, FolderContent
from paceline.exports.reader.check import check_folder
from paceline.exports.reader.forward import readers
from paceline.exports.reader.replay import Replay, ServedTarget, Verdict

OURS = "midlayer."  # the prefix of the decoder layer in a checkpoint


@dataclass(frozen=True)
class Eagle3Export:
    """`layer`: the prefix of the decoder layer; `embedding`: the folder carries the target's embedding;
    `windowed`: every server of the format reads a sliding window of the draft's attention from it."""

    server: str
    config: Callable[[ExportedDraft], dict[str, Any]]
    layer: str = OURS
    embedding: bool = False
    windowed: bool = False

    def build(self, draft: ExportedDraft) -> FolderContent:
        if draft.sizes.get("sliding_window") and not self.windowed:
            raise ConfigError(
                f"A draft with a sliding window cannot be exported for {self.server}.",
                why="Its servers do not read the window from the folder, and would attend to all rows.",
                next="export it for vllm, or train a draft without method.sliding_window.",
            )
        renamed = {
            self.layer + name.removeprefix(OURS) if name.startswith(OURS) else name: tensor.contiguous()
            for name, tensor in draft.tensors.items()
        }
        if draft.sizes["draft_vocab_size"] == draft.sizes["vocab_size"]:
            # The maps of a whole vocabulary change nothing.
            renamed = {name: tensor for name, tensor in renamed.items() if name not in ("d2t", "t2d")}
        if self.embedding:
            renamed["embed_tokens.weight"] = draft.target.embed_tokens.contiguous()
            if "mask_hidden" in renamed:
                renamed["mask_hidden"] = renamed["mask_hidden"].unsqueeze(0)
        refuse_others(self.server, renamed, expected(draft.sizes, layer=self.layer, embedding=self.embedding))
        return FolderContent(self.config(draft), renamed)

    def check(self, folder: Path, target: ServedTarget, replays: Sequence[Replay]) -> Verdict:
        return check_folder(folder, readers(self.server), target, replays)


VLLM = Eagle3Export("vllm", flat_config, layer="layers.0.", windowed=True)
SGLANG = Eagle3Export("sglang", flat_config)
HF = Eagle3Export("hf", flat_config)
SPECULATORS = Eagle3Export("speculators", speculators_config, layer="layers.0.", embedding=True)
