"""The records: metadata only, frozen, and the same after a trip through JSON."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from paceline import FeatureSpec, PromptTask, SampleRef, assert_no_tensors
from paceline.testing.samples import sample_ref
from paceline.types import Feature, Rows, States, Targets, Tokens, name_of, ref_from_json, ref_to_json


def test_a_ref_needs_only_what_identifies_it() -> None:
    """Seven keywords make a ref; everything else has a default."""
    ref = SampleRef(
        sample_id="s",
        run_id="r",
        source_task_id=None,
        feature_store_uri="mem://r",
        feature_keys={},
        feature_specs={},
        strategy="eagle3",
    )
    assert ref_from_json(ref_to_json(ref)) == ref
    assert ref.draft_weight_version is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        ref.sample_id = "other"  # type: ignore[misc]


def test_nested_specs_survive_json() -> None:
    """Shapes come back as tuples, meta data as it was."""
    spec = FeatureSpec("x", (1, 8, 4), "bfloat16", target_repr="hidden_state", target_meta={"v": 1})
    ref = dataclasses.replace(sample_ref(1), feature_specs={"x": spec}, metadata={"a": [1, None, "b"]})
    assert ref_from_json(ref_to_json(ref)) == ref


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1), np.zeros(1), np.float32(1.0), torch.nn.Parameter(torch.ones(2))]
)
def test_tensors_are_found_wherever_they_hide(tensor: object) -> None:
    """In records, mappings, keys and sequences of any depth; the path to it is named."""
    for hiding_place in (tensor, [1, tensor], {"a": ({"b": tensor},)}, {"k": frozenset()} | {"t": tensor}):
        with pytest.raises(TypeError, match="metadata only"):
            assert_no_tensors(hiding_place)
    with pytest.raises(TypeError, match=r"record\.payload\['ids'\]"):
        assert_no_tensors(PromptTask("t", "r", payload={"ids": tensor}))


def test_metadata_passes() -> None:
    """Plain values of any depth are what the control plane is for."""
    assert_no_tensors(PromptTask("t", "r", payload={"ids": list(range(100)), "text": "x", "none": None}))
    assert_no_tensors({"a": [1, 2.5, b"x", True, {"b": ("c",)}]})


def test_what_json_cannot_carry_is_refused() -> None:
    """A NaN would not survive every reader; bytes and sets would come back as something else."""
    with pytest.raises(ValueError, match=r"metadata\['x'\]\[1\] is nan"):
        ref_to_json(dataclasses.replace(sample_ref(0), metadata={"x": [0.5, float("nan")]}))
    for value in (b"bytes", {1, 2}, object(), np.float32(1.0)):
        with pytest.raises(TypeError):
            ref_to_json(dataclasses.replace(sample_ref(0), metadata={"x": {"y": value}}))


def test_text_that_is_no_ref_is_refused() -> None:
    """Damaged, incomplete, of a wrong type, or of a version this one does not know."""
    text = ref_to_json(sample_ref(0))
    newer = text.replace('"schema_version":1', '"schema_version":2')
    for wrong in (text[:-2], "{}", text.replace('"num_tokens":4', '"num_tokens":"4"'), newer):
        with pytest.raises(ValueError, match="ref"):
            ref_from_json(wrong)


def test_only_states_can_be_cut_to_some_of_their_rows() -> None:
    """Tokens and targets are whole: every reader counts on one entry for each token."""
    Feature("late", States((8,)), Rows.PREDICTED, dtype="float32")
    for source in (Tokens(), Targets()):
        with pytest.raises(ValueError, match="'words'"):
            Feature("words", source, Rows.PREDICTED, dtype="int32")


def test_a_method_without_tokens_is_named_as_one() -> None:
    """Whatever it calls them, every sample's tokens are found by what they are."""
    late = Feature("late", States((8,)), dtype="float32")
    assert name_of(Tokens, (late, Feature("words", Tokens(), dtype="int32"))) == "words"
    with pytest.raises(ValueError, match="no feature is Targets"):
        name_of(Targets, (late,))
