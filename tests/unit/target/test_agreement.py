"""Samples that are not their target's own are refused before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.errors import CaptureMismatchError
from paceline.methods.eagle3.method import Eagle3Method
from paceline.target.agreement import refuse_disagreement
from paceline.target.head import TargetHead
from paceline.types import Feature, Rows

Sample = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def head(tiny_model: Path) -> TargetHead:
    return TargetHead.load(tiny_model)


@pytest.fixture(scope="module")
def features(head: TargetHead) -> tuple[Feature, ...]:
    return Eagle3Method({}).features(head.facts)


@pytest.fixture(scope="module")
def samples(tiny_model: Path, features: tuple[Feature, ...]) -> list[Sample]:
    """Two greedy answers."""
    engine = TransformersEngine(tiny_model, dtype="float32")
    texts = ["the wind turns a wheel", "go"]
    group = [CaptureRequest(f"s{i}", engine.encode(text), max_new_tokens=9) for i, text in enumerate(texts)]
    return [dict(sample.tensors) for sample in engine.capture(group, features)]


def test_the_targets_own_samples_pass(
    head: TargetHead, features: tuple[Feature, ...], samples: list[Sample]
) -> None:
    """With the rows that predict, with all rows, and of a method that keeps no last state."""
    refuse_disagreement(head, features, samples)
    refuse_disagreement(head, features[:3], samples)
    assert features[3].rows == Rows.PREDICTED


def scaled_gain(head: TargetHead) -> TargetHead:
    return replace(head, norm_weight=head.norm_weight.flip(0))


def another_lm_head(head: TargetHead) -> TargetHead:
    return replace(head, lm_head=head.lm_head.roll(1, 0))


def lm_head_with_nan(head: TargetHead) -> TargetHead:
    lm_head = head.lm_head.clone()
    lm_head[7] = float("nan")
    return replace(head, lm_head=lm_head)


@pytest.mark.parametrize("change", [scaled_gain, another_lm_head, lm_head_with_nan])
def test_another_head_is_refused(
    head: TargetHead,
    features: tuple[Feature, ...],
    samples: list[Sample],
    change: Callable[[TargetHead], TargetHead],
) -> None:
    """The states are sound; what the trainer would make of them is not the target's."""
    with pytest.raises(CaptureMismatchError, match="first samples"):
        refuse_disagreement(change(head), features, samples)


def test_states_of_other_rows_are_refused(
    head: TargetHead, features: tuple[Feature, ...], samples: list[Sample]
) -> None:
    """Off by one row, nothing else wrong."""
    shifted = [{**s, "last_hidden_states": s["last_hidden_states"].roll(1, 0)} for s in samples]
    with pytest.raises(CaptureMismatchError, match="not the argmax of its states"):
        refuse_disagreement(head, features, shifted)
