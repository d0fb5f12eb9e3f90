"""The facts of a target that the rest of the system uses. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Sizes(Protocol):
    """What names a target's sizes: its shape, its head, or the library's configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


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

    @classmethod
    def by_sizes(
        cls,
        sizes: Sizes,
        dtype: str,
        *,
        max_positions: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        version: str = "",
    ) -> TargetFacts:
        """As far as no engine is needed to know them: a sample's bytes follow from these."""
        return cls(
            hidden_size=int(sizes.hidden_size),
            num_hidden_layers=int(sizes.num_hidden_layers),
            vocab_size=int(sizes.vocab_size),
            dtype=dtype,
            eos_token_ids=eos_token_ids,
            model_version=version,
            tokenizer_version=version,
            max_positions=max_positions,
        )
