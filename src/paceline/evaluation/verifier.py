"""The contract between lossless decoding and the target: one sequence, read token by token or as a tree.

Plain and speculative decoding use the same target, so what they are compared by is one forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from paceline.errors import ConfigError
from paceline.evaluation.tree import DraftTree


@dataclass(frozen=True)
class TargetStep:
    """Outputs of the new rows. `aux` puts the states that the draft reads side by side."""

    logits: torch.Tensor  # [n, V], or [1, V] where only the last row was asked for
    aux: torch.Tensor  # [n, number of states * H]


class Verifier(Protocol):
    """Adapters: target.py (plain Llama, fast), library_target.py (every family)."""

    device: torch.device
    capacity: int  # of the sequence that was started last

    def start(self, capacity: int) -> None:
        """Begin an empty sequence of at most `capacity` tokens. Raises ConfigError if that is too many."""

    def forward(self, token_ids: torch.Tensor, last_only: bool = False) -> TargetStep:
        """Read `token_ids` int64 [n] after the sequence, which they extend."""

    def verify(self, tree: DraftTree) -> TargetStep:
        """The outputs of every row of the tree, each after the sequence and its own path."""

    def accept(self, path: list[int]) -> None:
        """Extend the sequence by one path, from the root, of the tree that was verified last."""


def refuse_too_long(capacity: int, positions: int | None) -> None:
    """Raise ConfigError for a sequence of more tokens than the target has positions (None: no limit)."""
    if positions is not None and capacity > positions:
        raise ConfigError(
            f"A sequence of {capacity} tokens exceeds the target's {positions} positions.",
            why="Positions past the trained range give meaningless logits.",
            next="lower max_new_tokens or shorten the prompt",
        )
