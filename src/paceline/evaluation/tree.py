"""A draft tree: several guesses at the next tokens that one target pass verifies together.

Row 0 is the newest token of the text; every other row is a guess, after its parent. A chain is a tree
without branches. EAGLE-2 (arXiv 2406.16858) section 4.1 grows the tree by the draft's own confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.precision import CPU


@dataclass(frozen=True)
class Drafting:
    """`num_tokens` guesses per cycle, at most `depth` deep, with at most `branching` after each guess."""

    num_tokens: int
    branching: int = 1
    depth: int | None = None

    @property
    def is_chain(self) -> bool:
        return self.branching == 1

    @property
    def max_depth(self) -> int:
        return self.depth or self.num_tokens


@dataclass(frozen=True)
class DraftTree:
    """`tokens[i]` follows row `parents[i]`; parents come before their children; `parents[0]` is -1."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> DraftTree:
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)))

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self.tokens) - 1))

    def path(self, row: int) -> list[int]:
        """Rows from the root to `row`."""
        path = [row]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def leaves(self) -> list[int]:
        """The rows that no row follows; their paths cover the tree."""
        return sorted(set(range(len(self.tokens))) - set(self.parents))

    def paths(self) -> torch.Tensor:
        """int64 [rows, depth]: each row's path, its own number repeated to the end."""
        paths = [self.path(row) for row in range(len(self.tokens))]
        depth = max(len(path) for path in paths)
        return torch.tensor([path + [path[-1]] * (depth - len(path)) for path in paths], device=CPU)

    def depths(self) -> torch.Tensor:
        """int64 [rows]: 0 for the root."""
        return torch.tensor([len(self.path(row)) - 1 for row in range(len(self.tokens))], device=CPU)

    def along(self, tokens: Sequence[int]) -> list[int]:
        """The longest path whose guesses are these tokens, one after the other, from the root's row on."""
        path = [0]
        for token in tokens:
            children = self._children(path[-1], token)
            if not children:
                break
            path.append(children[0])
        return path

    def follow(self, wanted: list[int]) -> list[int]:
        """The longest path on which every token is the target's own choice after its parent."""
        path = [0]
        while True:
            children = self._children(path[-1], wanted[path[-1]])
            if not children:
                return path
            path.append(children[0])

    def _children(self, row: int, token: int) -> list[int]:
        """The guesses of this token after the row."""
        return [
            child
            for child, parent in enumerate(self.parents)
            if parent == row and self.tokens[child] == token
        ]
