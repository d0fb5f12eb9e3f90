"""A target of any family as lossless decoding uses it: the library's own forward.

The leaves of a tree are rows of one batch, each over a copy of the sequence's past. A past that can be cut
keeps the accepted row. A recurrent one is read token by token, and the accepted tokens once more. A family
without an exact cache reads the whole sequence in every pass. The last two are slow and right.

Legend: L leaves, d depth, n new rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch

from paceline.engines.hooks import Hooks
from paceline.evaluation.tree import DraftTree
from paceline.evaluation.verifier import TargetStep, refuse_too_long
from paceline.precision import CPU
from paceline.target.decoder import Past, TextDecoder


class LibraryTarget:
    """See `Verifier`. `aux_layer_ids`: the blocks after which the draft reads the target's states."""

    def __init__(
        self,
        folder: Path,
        aux_layer_ids: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        """Raises ConfigError or EngineError if the folder's model cannot be loaded."""
        self.aux_layer_ids, self.device, self.capacity = aux_layer_ids, device, 0
        self.decoder = TextDecoder(folder, dtype, device)

    def start(self, capacity: int) -> None:
        refuse_too_long(capacity, getattr(self.decoder.config, "max_position_embeddings", None))
        self.capacity, self._past = capacity, self.decoder.past()

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, last_only: bool = False) -> TargetStep:
        logits, aux = self._read(token_ids[None], self._past, last_only)
        return TargetStep(logits[0], aux[0])

    @torch.inference_mode()
    def verify(self, tree: DraftTree) -> TargetStep:
        paths = tree.paths()[tree.leaves()]  # [L, d]
        self._paths: list[list[int]] = paths.tolist()
        paths, self._tokens = paths.to(self.device), torch.tensor(tree.tokens, device=self.device)
        at_once = len(paths) if self._past.can_branch else 1
        self._branches, outputs = [], []
        for tokens in self._tokens[paths].split(at_once):
            self._branches.append(self._past.branch(len(tokens)))
            outputs.append(self._read(tokens, self._branches[-1]))
        logits, aux = (torch.cat(parts) for parts in zip(*outputs, strict=True))  # [L, d, ...]
        # A row may be on the paths of several leaves, and a leaf is repeated at the end of a short path.
        leaves, places = zip(*(self._place(row) for row in range(len(tree.tokens))), strict=True)
        return TargetStep(logits[leaves, places], aux[leaves, places])

    @torch.inference_mode()
    def accept(self, path: list[int]) -> None:
        leaf = next(i for i, known in enumerate(self._paths) if known[: len(path)] == path)
        at_once = len(self._paths) // len(self._branches)
        branch = self._branches[leaf // at_once]
        if branch.can_cut:
            branch.keep(leaf % at_once, len(self._paths[leaf]) - len(path))
            self._past = branch
        else:
            self._read(self._tokens[path][None], self._past)
        self._branches = []

    def _place(self, row: int) -> tuple[int, int]:
        """A leaf on whose path the row lies, and its place on it."""
        return next((i, path.index(row)) for i, path in enumerate(self._paths) if row in path)

    def _read(
        self, token_ids: torch.Tensor, past: Past, last_only: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, n, V] and states of `token_ids` int64 [B, n] after `past`."""
        size = token_ids.shape[1] if past.can_cut else 1
        hidden, aux = [], []
        with Hooks(self.decoder.parts.layers, self.aux_layer_ids) as states:
            for tokens in token_ids.split(size, dim=1):
                hidden.append(self.decoder.read(tokens, past))
                aux.append(torch.cat([states.taken[k][:, -size:] for k in self.aux_layer_ids], dim=-1))
        last = hidden[-1][:, -1:] if last_only else torch.cat(hidden, dim=1)
        return self.decoder.logits(last), torch.cat(aux, dim=1)
