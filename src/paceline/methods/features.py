"""The features that every method here captures, from a target's facts alone. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from paceline.errors import ConfigError
from paceline.target.facts import TargetFacts
from paceline.types import Feature, Rows, States, Targets, Tokens

Transfer = Literal["exact", "float8"]
AuxLayers = Annotated[tuple[int, ...], Field(min_length=1)]


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
    last = num_hidden_layers - 1
    if not all(1 <= layer <= last for layer in layers) or list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"method.aux_layers is {list(layers)}, and the target has {num_hidden_layers} decoder blocks.",
            why="Every server can give a draft the states between two blocks, and servers sort them.",
            next=f"name each state once, from 1 to {last}, in ascending order.",
        )
    return layers
