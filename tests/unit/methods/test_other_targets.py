"""EAGLE-3 drafts of targets that are not laid out as Llama is, and vocabularies that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.errors import ConfigError
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.target.head import TargetHead
from paceline.testing.tiny_families import family_folder
from paceline.testing.tiny_target import VOCAB


@pytest.mark.parametrize("family", ["qwen3_moe", "phi3", "gemma2", "gpt2", "deepseek_v3"])
def test_the_default_start_needs_no_layer_of_the_target(tmp_path: Path, family: str) -> None:
    """Experts, fused projections, other norms: the regression reads captured states alone."""
    folder = family_folder(tmp_path / family, family)
    head, method = TargetHead.load(folder), Eagle3Method({"draft_vocab_size": 48, "ttt_steps": 2})
    method.check_target(head)
    engine = TransformersEngine(folder, dtype="float32", device="cpu")
    group = [CaptureRequest(f"s{n}", engine.encode("the wind"), max_new_tokens=9, seed=n) for n in range(2)]
    samples = [sample.tensors for sample in engine.capture(group, method.features(engine.facts))]
    draft = method.build(head, samples, 0)
    loss = draft(method.collate(samples, torch.device("cpu"))).loss_sum
    assert bool(torch.isfinite(loss))


@pytest.mark.parametrize("family", ["qwen3_moe", "phi3", "gemma2", "gpt2"])
def test_a_start_from_a_layer_with_other_names_is_refused_at_once(tmp_path: Path, family: str) -> None:
    """Before anything is captured, with the setting to change."""
    head = TargetHead.load(family_folder(tmp_path / family, family))
    with pytest.raises(ConfigError, match=r"last layer|cannot be read as a Llama layer") as caught:
        Eagle3Method({"init": "target", "draft_vocab_size": 48}).check_target(head)
    assert "method.init" in caught.value.next


def test_a_draft_vocabulary_is_at_most_the_whole_one(tmp_path: Path) -> None:
    """The default of 8192 on a target with fewer tokens drafts all of them."""
    head = TargetHead.load(family_folder(tmp_path / "model", "llama"))
    method = Eagle3Method({"draft_vocab_size": 8192})
    method.check_target(head)
    draft = method.build(head, _samples(head), 0)
    assert isinstance(draft, Eagle3Draft)
    assert draft.target_ids().tolist() == list(range(VOCAB))


def test_a_draft_vocabulary_without_room_for_the_ends_of_answers_is_refused(tmp_path: Path) -> None:
    """At the start, with the size that fits."""
    head = TargetHead.load(family_folder(tmp_path / "model", "llama", eos_token_id=[2, 5, 7]))
    with pytest.raises(ConfigError, match="draft_vocab_size=2 does not fit"):
        Eagle3Method({"draft_vocab_size": 2}).check_target(head)


def _samples(head: TargetHead) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    size = head.hidden_size
    return [
        {
            "input_ids": torch.randint(3, VOCAB, (12,), generator=generator, dtype=torch.int32),
            "loss_mask": torch.tensor([0] * 4 + [1] * 8, dtype=torch.uint8),
            "aux_hidden_states": torch.randn(11, 3 * size, generator=generator),
            "last_hidden_states": torch.randn(8, size, generator=generator),
        }
    ]
