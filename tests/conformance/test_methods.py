"""Every draft method runs the one suite."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from paceline.exports.blocks import BlockExport
from paceline.exports.eagle3 import SGLANG, VLLM
from paceline.exports.export import Export, ExportedDraft, TargetOfDraft
from paceline.exports.folder import write_folder
from paceline.methods.dflash.method import DFlashMethod
from paceline.methods.dflash.settings import (
    BlockSection,
    DFlash2Section,
    DFlashSection,
    DominoSection,
    DSparkSection,
)
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.parallel import PEagleMethod
from paceline.methods.method import DraftMethod
from paceline.target.head import TargetHead
from paceline.target.version import TargetVersion
from paceline.testing.method_suite import MethodSuite
from paceline.testing.tiny_target import captured_sample, tiny_target


@pytest.fixture(autouse=True)
def exported_folders_go_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def block_method(section: type[BlockSection], **knobs: Any) -> DraftMethod:
    """Small enough for the suite's target, and with fewer anchors than its samples have."""
    values = {"block_size": 4, "layers": 1, "target_states": 3, "anchors_max": 8, **knobs}
    return DFlashMethod(section.parse(values))


class TestDFlash(MethodSuite):
    def make(self) -> DraftMethod:
        return block_method(DFlashSection)


class TestDFlashOfManyGroups(MethodSuite):
    def make(self) -> DraftMethod:
        return block_method(
            DFlashSection,
            layers=2,
            causal=True,
            weighting="dpace",
            loss="tv",
            recompute=True,
            transfer="float8",
        )


class TestDSpark(MethodSuite):
    def make(self) -> DraftMethod:
        return block_method(DSparkSection, markov_rank=6)


class TestDSparkAfterTheAnchor(MethodSuite):
    def make(self) -> DraftMethod:
        return block_method(DSparkSection, sample_from_anchor=False, confidence_weight=0.0)


class TestDomino(MethodSuite):
    def make(self) -> DraftMethod:
        return block_method(DominoSection, gru_hidden_dim=12, emb_dim=8)


class TestDFlash2(MethodSuite):
    def make(self) -> DraftMethod:
        return block_method(DFlash2Section, selector_rank=6, selector_top_k=8, conv_kernel_size=3)


class TestEagle3(MethodSuite):
    def make(self) -> DraftMethod:
        return Eagle3Method({"draft_vocab_size": 40, "ttt_steps": 3})


class TestEagle31WithANormForEachState(MethodSuite):
    def make(self) -> DraftMethod:
        choices = {"fc_norm": True, "norm_output": True, "sliding_window": 17}
        return Eagle3Method({"draft_vocab_size": 40, "ttt_steps": 3, "loss": "lk_lambda", **choices})


class TestEagle31WithOneNorm(MethodSuite):
    def make(self) -> DraftMethod:
        choices = {"norm_before_fc": True, "recompute": True, "init": "target", "transfer": "float8"}
        return Eagle3Method({"draft_vocab_size": 40, "ttt_steps": 2, "loss": "lk_alpha", **choices})


class TestEagle3WithAFrozenHead(MethodSuite):
    def make(self) -> DraftMethod:
        return Eagle3Method({"draft_vocab_size": 40, "ttt_steps": 2, "train_lm_head": False})


class TestPEagle(MethodSuite):
    def make(self) -> DraftMethod:
        return PEagleMethod({"draft_vocab_size": 40, "ttt_steps": 3})


class TestPEagleWithAWindow(MethodSuite):
    def make(self) -> DraftMethod:
        choices = {"norm_before_fc": True, "sliding_window": 17, "recompute": True, "mask_token_id": 5}
        return PEagleMethod({"draft_vocab_size": 61, "ttt_steps": 2, "init": "target", **choices})


class TestEagle3FromTheTargetsLayer(MethodSuite):
    def make(self) -> DraftMethod:
        return Eagle3Method({"draft_vocab_size": 61, "ttt_steps": 2, "init": "target", "recompute": True})


def exported(method: DraftMethod, head: TargetHead, export: Export) -> Path:
    """A folder that a server loads, with a draft of `method` in it."""
    draft = method.build(head, [captured_sample(tiny_target(), 20, 4, seed=1)], seed=3)
    assert head.folder is not None
    version = TargetVersion.of(head.folder)
    target = TargetOfDraft("org/target", "", version, head.config, head.embed_tokens)
    sizes = method.describe(draft)
    content = ExportedDraft(method.name, draft.state_dict(), sizes, "float32", target, {"step": 1})
    folder = Path(tempfile.mkdtemp()) / "draft"
    write_folder(folder, export.build(content), lambda _: ("", {}))
    return folder


class TestEagle3FromAnExportedFolder(MethodSuite):
    def make(self) -> DraftMethod:
        first = Eagle3Method({"draft_vocab_size": 40, "init": "random"})
        return Eagle3Method({"start_from": exported(first, self.head, SGLANG), "ttt_steps": 2})


class TestPEagleFromAnExportedFolder(MethodSuite):
    def make(self) -> DraftMethod:
        first = PEagleMethod({"draft_vocab_size": 40, "init": "random"})
        return PEagleMethod({"start_from": exported(first, self.head, VLLM), "ttt_steps": 3})


class TestDSparkFromAnExportedFolder(MethodSuite):
    def make(self) -> DraftMethod:
        first = block_method(DSparkSection, markov_rank=6, init="random")
        folder = exported(first, self.head, BlockExport("sglang", "dspark"))
        return DFlashMethod(DSparkSection.parse({"start_from": folder, "anchors_max": 8}))
