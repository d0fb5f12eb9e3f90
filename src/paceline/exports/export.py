"""The contract of an export: it turns a checkpoint's draft into a folder that an inference server loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from paceline.exports.reader.replay import Replay, ServedTarget, Verdict
from paceline.target.version import TargetVersion

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TargetOfDraft:
    """The target that a draft was trained for.

    `name`: a hub id or an absolute path; `revision`: a commit of the hub, "" if unknown. `config`: its
    config.json, under the usual names of sizes.
    """

    name: str
    revision: str
    version: TargetVersion
    config: Mapping[str, Any]
    embed_tokens: torch.Tensor  # [V, H], as stored


@dataclass(frozen=True)
class ExportedDraft:
    """A checkpoint's draft in the dtype of the export.

    `tensors`: its state dict; `sizes`: what its method says of it (`DraftMethod.describe`); `origin`: the
    run, the step and the checkpoint's digest; `chain`: how many tokens a server is to draft in a cycle.
    """

    method: str
    tensors: Mapping[str, torch.Tensor]
    sizes: Mapping[str, Any]
    dtype: str
    target: TargetOfDraft
    origin: Mapping[str, Any]
    chain: int = 3


@dataclass(frozen=True)
class FolderContent:
    """What a server loads: config.json and model.safetensors."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


class Export(Protocol):
    """Adapters: servers.py, with a layout for each method; `paceline.exports.table` names them."""

    def build(self, draft: ExportedDraft) -> FolderContent:
        """Raises ConfigError for missing or surplus tensors, with the names, and for other methods."""

    def check(self, folder: Path, target: ServedTarget, replays: Sequence[Replay]) -> Verdict:
        """Load the written folder by the server's own rules, and replay dumped rows."""
