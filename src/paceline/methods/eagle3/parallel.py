"""P-EAGLE: EAGLE-3's draft, whose guesses are all made in one pass (arXiv 2602.01469).

The row of the newest token guesses the token after it, as in EAGLE-3. The rows after it, at the positions
that follow, read the embedding of a mask token and a learned vector in place of the target's states, and
guess the tokens further on. A row sees the rows before it, so a guess depends on the text alone and not on
the guesses before it. In training each anchor has such rows of its own, one for each step.

The paper drops most anchors of the deeper steps, because its attention is over all rows of all steps at once.
Here attention keeps no scores, and a step's memory does not depend on the others: every anchor learns every
step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.methods.drafter import Choose
from paceline.methods.eagle3.decode import Eagle3Decoder
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Config, Eagle3Draft
from paceline.methods.eagle3.settings import PEagleSection
from paceline.methods.guesses import ROOT, Guesses
from paceline.target.head import TargetHead

# `mask_hidden` begins as the mean of states, whose elements are far larger than Adam's equal steps.
_RATES = {"mask_hidden": 20.0}


class PEagleMethod(Eagle3Method):
    """As Eagle3Method; `DraftMethod` documents each member."""

    name = "p-eagle"
    settings: PEagleSection

    def __init__(self, settings: PEagleSection | Mapping[str, Any] | None = None) -> None:
        given = settings or {}
        super().__init__(given if isinstance(given, PEagleSection) else PEagleSection.parse(given))

    def _config(self, head: TargetHead) -> Eagle3Config:
        config, chosen = super()._config(head), self.settings.mask_token_id
        mask = config.mask_token_id  # of the folder that the run starts from
        if mask is None:
            mask = next(iter(head.eos_token_ids), 0) if chosen is None else chosen
        if mask >= head.vocab_size:
            raise ConfigError(
                f"method.mask_token_id is {mask}, and the target has {head.vocab_size} tokens.",
                why="The draft reads the target's embedding of it.",
                next=f"set method.mask_token_id between 0 and {head.vocab_size - 1}, or leave it out.",
            )
        return replace(config, mask_token_id=mask)

    def build(
        self, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]], seed: int
    ) -> Eagle3Draft:
        draft = super().build(head, samples, seed)
        if self._start is not None:
            return draft
        states = torch.cat([sample["aux_hidden_states"].float() for sample in samples])
        assert draft.mask_hidden is not None
        with torch.no_grad():
            draft.mask_hidden.copy_(states.mean(0, keepdim=True))
        return draft

    def learning_rate_scales(self) -> Mapping[str, float]:
        return {**super().learning_rate_scales(), **_RATES}

    def drafter(self, draft: nn.Module, dtype: torch.dtype) -> ParallelDecoder:
        assert isinstance(draft, Eagle3Draft)
        return ParallelDecoder(draft, dtype)


class ParallelDecoder(Eagle3Decoder):
    """Guesses a chain, or a tree, in one pass over the new rows and the mask rows after them."""

    def __init__(self, draft: Eagle3Draft, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(draft, dtype)
        assert draft.mask_hidden is not None
        self.mask_feature = self._fused(draft.mask_hidden.detach())
        self.mask_ids = draft.mask_ids

    @torch.inference_mode()
    def propose(
        self, aux: torch.Tensor, next_ids: torch.Tensor, count: int, choose: Choose
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        """See `Drafter`. A guess's distribution is that of its place, whatever the guesses before it are."""
        outputs = self._outputs(aux, next_ids, count)
        logits = self.lm_head(self._rms(outputs, self.norm))
        chosen = [choose(row) for row in logits]
        return self.target_ids[[draft_id for draft_id, _ in chosen]].tolist(), [q for _, q in chosen]

    @torch.inference_mode()
    def propose_tree(
        self, aux: torch.Tensor, next_ids: torch.Tensor, num_tokens: int, branching: int, depth: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `TreeDrafter`. All guesses of a level are followed by the same ones of the next."""
        outputs = self._outputs(aux, next_ids, depth)
        logits = self.lm_head(self._rms(outputs, self.norm)).float()
        guesses, frontier = Guesses(), [ROOT]
        for level in range(depth):
            frontier = guesses.grow(logits[level].expand(len(frontier), -1), frontier, branching, level)
        draft_ids, parents = guesses.best(num_tokens)
        return tuple(self.target_ids[draft_ids].tolist()), parents

    def _outputs(self, aux: torch.Tensor, next_ids: torch.Tensor, count: int) -> torch.Tensor:
        """Outputs [count, H] of the newest row and the mask rows after it; the cache keeps the new rows."""
        real_rows = self.length + aux.shape[0]
        features = torch.cat((self._fused(aux), self.mask_feature.expand(count - 1, -1)))
        outputs = self._layer(features, torch.cat((next_ids, self.mask_ids.expand(count - 1))))
        self.length = real_rows
        return outputs[-count:]
