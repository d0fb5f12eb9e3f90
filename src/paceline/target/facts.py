"""What the rest of the system may know of the target. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetFacts:
    """What the rest of the system may know of the target."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    model_version: str
    tokenizer_version: str
    max_positions: int | None = None  # the most tokens a sequence may have
    device: str = "cpu"  # the kind of device that it computes on
    repeats_bits: bool = True  # a group captured again has the bits it had
    groups_in_flight_max: int = 1  # how many groups the engine captures at the same time
