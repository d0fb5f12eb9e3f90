"""The facts of a target that the rest of the system uses. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetFacts:
    """A target's sizes, special tokens and version, and what its engine promises."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    model_version: str
    tokenizer_version: str
    max_positions: int | None = None  # the most tokens a sequence may have
    device: str = "cpu"  # the kind of device that computes it
    repeats_bits: bool = True  # a group captured again has the same bits
    groups_in_flight_max: int = 1  # how many groups the engine captures at the same time
