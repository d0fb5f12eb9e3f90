"""The features that every method here captures, from a target's facts alone. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.target.facts import TargetFacts
from paceline.types import Feature, Rows, States, Targets, Tokens


def fused_states(layers: Sequence[int], target: TargetFacts) -> tuple[Feature, ...]:
    """The features of a draft that reads the states after `layers` blocks side by side."""
    last = target.num_hidden_layers
    return (
        Feature("input_ids", Tokens(), dtype="int32"),
        Feature("loss_mask", Targets(), dtype="uint8"),
        # Prompt rows give the draft keys and values, but it never learns to predict their next tokens.
        Feature("aux_hidden_states", States(tuple(layers)), dtype=target.dtype),
        Feature("last_hidden_states", States((last,)), Rows.PREDICTED, dtype=target.dtype),
    )
