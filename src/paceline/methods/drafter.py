"""The contract between lossless decoding and a draft: the draft guesses tokens.

The decoder verifies every guess with the target, so a wrong guess costs time, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

# Draft logits [D] in, (draft token id, its distribution float32 [D] or None when greedy) out.
Choose = Callable[[torch.Tensor], tuple[int, torch.Tensor | None]]


class Drafter(Protocol):
    """One sequence at a time, on the device of the draft's weights.

    Adapters: eagle3/decode.py, evaluation/lookup.py.
    """

    target_ids: torch.Tensor  # int64 [D]: the target's id of every token that the draft can guess
    layers: tuple[int, ...]  # of the target, whose states `propose` reads side by side

    def start(self, capacity: int) -> None:
        """Begin a sequence of at most `capacity` rows, drafted ones included."""

    def propose(
        self, aux: torch.Tensor, next_ids: torch.Tensor, count: int, choose: Choose
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        """A chain of up to `count` guesses (target ids), and each one's distribution over the draft's tokens.

        `aux` [n, len(layers) * H] are the states of the rows that the target has newly processed,
        `next_ids` int64 [n] the token after each; the last one is the newest token of the sequence.
        A guess that was not drawn from a distribution has None. Without a guess, the cycle is a plain step.
        """


@runtime_checkable
class TreeDrafter(Drafter, Protocol):
    """A draft that can also guess several tokens for one position."""

    def propose_tree(
        self, aux: torch.Tensor, next_ids: torch.Tensor, num_tokens: int, branching: int, depth: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The `num_tokens` likeliest guesses of a tree: (tokens, parent rows). Row 0 is the newest token,
        guess i is row i + 1; a parent comes before its children."""
