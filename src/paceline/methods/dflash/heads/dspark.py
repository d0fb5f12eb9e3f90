"""DSpark's head (arXiv 2607.05147): a guess knows the token before it, and how likely it is to be kept.

The Markov head adds to a guess's logits a score of every token after the token before it, of low rank: the
latent is `markov_w1` of that token and `markov_w2` has one row a token. The confidence head predicts, from a
place's state and the same latent, the rate at which the target would accept the guess. Servers may use it to
draft fewer tokens; decoding here does not.

Legend: A blocks, D guesses of a block, H hidden, V vocabulary, r rank, n rows, m target rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.methods.dflash.config import DFlashConfig
from paceline.methods.dflash.heads.head import Head, Places, Rows
from paceline.methods.dflash.settings import DSparkSection

if TYPE_CHECKING:
    from paceline.methods.dflash.settings import BlockSection


class MarkovHead(nn.Module):
    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)


class ConfidenceHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)


class DSparkHead(Head):
    def __init__(self, section: BlockSection, config: DFlashConfig) -> None:
        assert isinstance(section, DSparkSection)
        self.section = section
        self.markov = MarkovHead(config.vocab_size, section.markov_rank)
        width = config.hidden_size + section.markov_rank
        self.confidence = ConfidenceHead(width) if section.confidence_weight > 0 else None

    def parts(self) -> dict[str, nn.Module]:
        known: dict[str, nn.Module | None] = {
            "markov_head": self.markov,
            "confidence_head": self.confidence,
        }
        return {name: part for name, part in known.items() if part is not None}

    def initialise(self) -> None:
        if self.confidence is not None:
            self.confidence.proj.bias.zero_()

    def describe(self) -> dict[str, Any]:
        return {
            "markov_rank": self.section.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": self.confidence is not None,
            "confidence_head_with_markov": self.confidence is not None,
        }

    def latents(self, places: Places) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.markov.markov_w1(places.previous), None

    def rows(self) -> torch.Tensor:
        return self.markov.markov_w2.weight

    def more_loss(self, rows: Rows) -> torch.Tensor | None:
        """`confidence_weight` times the cross entropy of predicted and actual acceptance rates."""
        if self.confidence is None or rows.latents is None:
            return None
        features = torch.cat((rows.hidden, rows.latents.to(rows.hidden.dtype)), dim=-1)
        predicted = self.confidence.proj(features)[:, 0].float()
        losses = F.binary_cross_entropy_with_logits(predicted, acceptance(rows), reduction="none")
        return self.section.confidence_weight * (losses * rows.scale).sum()


@torch.no_grad()
def acceptance(rows: Rows) -> torch.Tensor:
    """float32 [n]: how much of the draft's and the target's distributions is common, which is the rate at
    which rejection sampling keeps a guess (arXiv 2211.17192, section 3)."""
    kept = torch.empty_like(rows.scale)
    size = max(1, _BLOCK_LOGITS // rows.logits.shape[1])
    for start in range(0, rows.scale.shape[0], size):
        block = slice(start, start + size)
        draft, target = rows.logits[block].float().softmax(-1), rows.wanted[rows.picked[block]].softmax(-1)
        kept[block] = torch.minimum(draft, target).sum(-1)
    return kept.clamp(0.0, 1.0)


_BLOCK_LOGITS = 1 << 19  # 2 MiB of float32, which stay in a cache
