"""The features that every method here captures, from a target's facts alone. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from paceline.target.facts import TargetFacts
from paceline.target.layer_ids import LAYER_IDS
from paceline.types import Feature, Rows, States, Targets, Tokens

Transfer = Literal["exact", "float8"]


def fused_states(layers: Sequence[int], target: TargetFacts, transfer: Transfer) -> tuple[Feature, ...]:
    """The features of a draft that reads the states after `layers` blocks side by side.

    `transfer` is of these alone: the last states are the target's distribution, which nothing may round.
    """
    last = target.num_hidden_layers
    return (
        Feature("input_ids", Tokens(), dtype="int32"),
        Feature("loss_mask", Targets(), dtype="uint8"),
        # Prompt rows give the draft keys and values, but it never learns to predict their next tokens.
        Feature(
            "aux_hidden_states",
            States(tuple(layers)),
            dtype=target.dtype,
            narrowed=transfer == "float8",
        ),
        Feature("last_hidden_states", States((last,)), Rows.PREDICTED, dtype=target.dtype),
    )


def readable_layers(layers: tuple[int, ...], num_hidden_layers: int) -> tuple[int, ...]:
    """The setting `aux_layers`. Raises ConfigError for states that some server cannot give to a draft."""
    LAYER_IDS["sglang.eagle3"].written(layers, num_hidden_layers)
    return layers
