"""A tree of guesses that grows by the draft's own probabilities (EAGLE-2, arXiv 2406.16858, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROOT = -1  # the number of the newest token, which all guesses follow


class Guesses:
    """Guesses in the order in which they grew. A guess has a number; its likelihood is that of its path."""

    def __init__(self) -> None:
        self._grown: list[tuple[float, int, int, int]] = []  # log-likelihood, draft id, parent, level

    def grow(self, logits: torch.Tensor, parents: Sequence[int], branching: int, level: int) -> list[int]:
        """Add the `branching` likeliest guesses after each of `parents`, from `logits` float32
        [len(parents), D]; the numbers of the likeliest of all of them, at most `branching`, in order."""
        best = logits.log_softmax(-1).topk(min(branching, logits.shape[-1]), dim=-1)
        first = len(self._grown)
        for row, parent in enumerate(parents):
            so_far = self._grown[parent][0] if parent != ROOT else 0.0
            for value, draft_id in zip(best.values[row].tolist(), best.indices[row].tolist(), strict=True):
                self._grown.append((so_far + value, draft_id, parent, level))
        return sorted(range(first, len(self._grown)), key=lambda g: -self._grown[g][0])[:branching]

    def draft_ids(self, numbers: Sequence[int]) -> list[int]:
        return [self._grown[g][1] for g in numbers]

    def parents(self, numbers: Sequence[int]) -> list[int]:
        return [self._grown[g][2] for g in numbers]

    def best(self, count: int) -> tuple[list[int], tuple[int, ...]]:
        """(draft ids, parent rows) of the `count` likeliest guesses, parents first.

        Row 0 is the newest token and guess i is row i + 1. A parent is never less likely than its child.
        """
        chosen = sorted(range(len(self._grown)), key=lambda g: (-self._grown[g][0], self._grown[g][3]))[
            :count
        ]
        chosen.sort(key=lambda g: self._grown[g][3])
        rows = {guess: row for row, guess in enumerate(chosen, start=1)}
        return self.draft_ids(chosen), tuple(rows.get(parent, 0) for parent in self.parents(chosen))
