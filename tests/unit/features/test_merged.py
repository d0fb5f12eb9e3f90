"""One capture serves several methods: each gets the tensors that a capture of its own would have given."""

from __future__ import annotations

import pytest
import torch

from paceline.engines.capture_rows import kept_rows
from paceline.features.merged import covers, feature_named, merged, num_targets, of_method
from paceline.types import Feature, Rows, States, Targets, Tokens

HIDDEN, LENGTH = 3, 6
TOKENS = (Feature("input_ids", Tokens(), dtype="int32"), Feature("loss_mask", Targets(), dtype="uint8"))
ONE = (
    *TOKENS,
    Feature("aux", States((5, 2)), dtype="float32"),
    Feature("last", States((8,)), Rows.PREDICTED, dtype="float32"),
)
OTHER = (
    Feature("ids", Tokens(), dtype="int64"),
    Feature("mask", Targets(), dtype="uint8"),
    Feature("deep", States((8, 7)), dtype="float32"),
    Feature("rows", States((7,)), Rows.PREDICTED, dtype="float32"),
)


def captured(features: tuple[Feature, ...]) -> dict[str, torch.Tensor]:
    """What an engine gives for these features: a function of token, layer and dtype alone."""
    mask = [0, 0, 1, 0, 1, 1, 1]
    tensors = {}
    for feature in features:
        dtype = getattr(torch, feature.dtype)
        if isinstance(feature.source, States):
            rows = kept_rows(feature, [bool(value) for value in mask])
            numbers = torch.arange(LENGTH * HIDDEN).view(LENGTH, HIDDEN)
            states = [100 * k + numbers for k in feature.source.layers]
            tensors[feature.name] = torch.cat(states, dim=-1)[rows].to(dtype)
        else:
            values = list(range(LENGTH + 1)) if isinstance(feature.source, Tokens) else mask
            tensors[feature.name] = torch.tensor(values, dtype=dtype)
    return tensors


@pytest.mark.parametrize("features", [ONE, OTHER])
def test_a_method_gets_what_its_own_capture_gives(features: tuple[Feature, ...]) -> None:
    kept = merged([ONE, OTHER])
    found = of_method(captured(kept), kept, features)
    expected = captured(features)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_each_state_is_kept_once_with_the_widest_rows() -> None:
    """The order of the methods does not matter."""
    kept = merged([ONE, OTHER])
    assert kept == merged([OTHER, ONE])
    assert {feature.name: str(feature.rows) for feature in kept} == {
        "state 2 float32": "all",
        "state 5 float32": "all",
        "state 7 float32": "all",
        "state 8 float32": "all",
        "targets uint8": "all",
        "tokens int32": "all",
        "tokens int64": "all",
    }
    assert {f.name: str(f.rows) for f in merged([ONE])}["state 8 float32"] == "predicted"


def test_kept_features_cover_less_and_never_more() -> None:
    both, one, other = merged([ONE, OTHER]), merged([ONE]), merged([OTHER])
    assert covers(both, one)
    assert covers(both, other)
    assert covers(one, one)
    assert not covers(one, other)
    assert not covers(other, one)
    assert not covers(one, merged([ONE, (*TOKENS, Feature("last", States((8,)), dtype="float32"))]))


def test_a_feature_is_found_by_its_name() -> None:
    for feature in merged([ONE, OTHER]):
        assert feature_named(feature.name, feature.rows.value) == feature
    with pytest.raises((ValueError, LookupError)):
        feature_named("states of mind", "all")


def test_tokens_to_learn_are_counted_without_the_first() -> None:
    kept = merged([ONE])
    sample = captured(kept)
    assert num_targets(sample, kept) == 4
    sample["targets uint8"][0] = 1
    assert num_targets(sample, kept) == 4
