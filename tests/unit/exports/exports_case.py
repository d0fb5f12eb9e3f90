"""A draft of a tiny target, whose rotary base is not the default of any server, and dumped rows of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from paceline.exports.export import Export, ExportedDraft, TargetOfDraft
from paceline.exports.folder import write_folder
from paceline.exports.reader.replay import Replay, ServedTarget, Verdict
from paceline.exports.table import EXPORTS
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.parallel import PEagleMethod
from paceline.methods.method import DraftMethod
from paceline.roles.dumped_rows import _neighbours, _random, _replay
from paceline.target.head import TargetHead
from paceline.target.version import TargetVersion
from paceline.testing.tiny_target import captured_sample, save_target, tiny_target

ROPE = {"rope_type": "default", "rope_theta": 50000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 64}
UNTRUNCATED = {
    **YARN,
    "rope_theta": 150000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
TWO_SCALES = {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
OTHER_SCALES = {**YARN, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.2}
LINEAR = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}


@dataclass(frozen=True)
class Case:
    """What an exporter has at hand."""

    folder: Path  # the target's
    draft: ExportedDraft
    target: ServedTarget
    replays: list[Replay]

    def export(self, name: str, folder: Path) -> Path:
        write_folder(folder, adapter(name).build(self.draft), lambda aside: ("card", {}))
        return folder

    def check(self, name: str, folder: Path) -> Verdict:
        return adapter(name).check(folder, self.target, self.replays)


def adapter(name: str) -> Export:
    found: Export = EXPORTS.find(name)
    return found


def target_folder(folder: Path, rope: dict[str, Any]) -> Path:
    save_target(tiny_target(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    return folder


def make_case(folder: Path, rope: dict[str, Any] = ROPE, vocab: int = 48, **settings: Any) -> Case:
    """`settings`: further ones of the method."""
    kind = PEagleMethod if settings.get("name") == "p-eagle" else Eagle3Method
    method = kind({"draft_vocab_size": vocab, "init": "random", **settings})
    return case_of(method, target_folder(folder, rope))


def case_of(method: DraftMethod, folder: Path) -> Case:
    """A draft without a weight that could hide a mistake by being zero or one."""
    head = TargetHead.load(folder)
    draft = method.build(head, [captured_sample(tiny_target(), 20, 4, seed=1)], seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    drafter = method.drafter(draft, torch.float32)
    layers = _neighbours(drafter.layers, head.num_hidden_layers)
    replays = [_replay(drafter, tokens, states) for tokens, states in _random(head, layers)]
    version = TargetVersion.of(folder)
    return Case(
        folder=folder,
        draft=ExportedDraft(
            method=method.name,
            tensors={name: tensor.clone() for name, tensor in draft.state_dict().items()},
            sizes=method.describe(draft),
            dtype="float32",
            target=TargetOfDraft("org/target", "", version, head.config, head.embed_tokens),
            origin={"run": "tiny", "step": 7, "checkpoint": "0" * 64},
        ),
        target=ServedTarget(head.hidden_size, head.num_hidden_layers, 256, head.embed_tokens, head.lm_head),
        replays=replays,
    )


def without(case: Case, name: str) -> Case:
    tensors = {key: tensor for key, tensor in case.draft.tensors.items() if key != name}
    return replace(case, draft=replace(case.draft, tensors=tensors))
