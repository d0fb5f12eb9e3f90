"""Domino's head (arXiv 2605.29707): a recurrent layer reads the tokens before a guess and corrects its
logits.

A GRU reads the target's embeddings of the block's tokens. Its state after the token before a place, with the
place's own state, goes through a small MLP whose last matrix has one row a token. The first guess is the
backbone's own: that is how SGLang decodes (`pure_draft_prefix_len` 1).

Legend: A blocks, D guesses of a block, H hidden, G size of the GRU's state, E size of a latent, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.methods.dflash.config import DFlashConfig
from paceline.methods.dflash.heads.head import Head, Places, Rows
from paceline.methods.dflash.settings import DominoSection
from paceline.methods.losses.distribution import distribution_loss
from paceline.precision import without_autocast

if TYPE_CHECKING:
    from paceline.methods.dflash.settings import BlockSection


class DominoHead(Head):
    """`state` is [A, G + 1]: the GRU's state, and how many tokens it has read."""

    def __init__(self, section: BlockSection, config: DFlashConfig) -> None:
        assert isinstance(section, DominoSection)
        self.section = section
        self.gru = nn.GRU(config.hidden_size, section.gru_hidden_dim, bias=False, batch_first=True)
        width = config.hidden_size + section.gru_hidden_dim
        self.first = nn.Linear(width, section.emb_dim, bias=False)
        self.last = nn.Linear(section.emb_dim, config.vocab_size, bias=False)

    def parts(self) -> dict[str, nn.Module]:
        return {"prefix_gru": self.gru, "embed_proj": nn.Sequential(self.first, nn.SiLU(), self.last)}

    def describe(self) -> dict[str, Any]:
        return {
            "projector_type": "domino",
            "gru_hidden_dim": self.section.gru_hidden_dim,
            "emb_dim": self.section.emb_dim,
            "pure_draft_prefix_len": 1,
            "shift_label": False,
        }

    def latents(self, places: Places) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        hidden, state = places.hidden, places.state
        before = None if state is None else state[None, :, :-1].contiguous()
        with without_autocast(hidden.device):  # its kernels take one dtype
            read, after = self.gru(places.embed(places.previous), before)
        made = nn.functional.silu(self.first(torch.cat((hidden, read.to(hidden.dtype)), dim=-1)))
        count = torch.zeros_like(after[0, :, :1]) if state is None else state[:, -1:]
        depths = count + torch.arange(hidden.shape[1], device=count.device)
        latents = torch.where((depths > 0)[..., None], made, 0.0)
        return latents, torch.cat((after[0], count + hidden.shape[1]), dim=-1)

    def rows(self) -> torch.Tensor:
        return self.last.weight

    def more_loss(self, rows: Rows) -> torch.Tensor | None:
        """`base_weight` times the loss of the backbone's own logits, which the correction starts from."""
        if self.section.base_weight == 0:
            return None
        parts = self.section.loss, rows.base, rows.wanted, rows.picked, rows.scale
        return self.section.base_weight * distribution_loss(*parts)[0]
