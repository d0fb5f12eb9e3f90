"""What follows the backbone of a block draft. The base class is plain DFlash, which adds nothing.

The backbone turns every place of a block into a state on its own. A head lets a guess depend on the ones
before it: it makes a short vector, the *latent*, of a place's state and the tokens before it, and the
latent's product with one row a token corrects the logits. Training knows the tokens before a place from the
sample, decoding from the guesses so far; both call the same functions.

Legend: A blocks, D guesses of a block, H hidden, V vocabulary, r size of a latent, n rows, m target rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from paceline.methods.dflash.config import DFlashConfig
    from paceline.methods.dflash.settings import BlockSection

Embed = Callable[
    [torch.Tensor], torch.Tensor
]  # token ids int64 [...] in, the target's embedding [..., H] out


@dataclass(frozen=True)
class Places:
    """Places that guess, each after the token `previous`. `state`: what the places before these left; None at
    a block's first guess."""

    hidden: torch.Tensor  # [A, D, H], normed
    previous: torch.Tensor  # int64 [A, D]
    embed: Embed
    state: torch.Tensor | None = None  # [A, *]


@dataclass(frozen=True)
class Rows:
    """Guesses of a group in training. `wanted` are the target's logits; guess i is compared with row
    `picked[i]` of them and weighs `scale[i]`, 0 where it does not count."""

    hidden: torch.Tensor  # [n, H], normed
    base: torch.Tensor  # [n, V]: the backbone's logits
    latents: torch.Tensor | None  # [n, r]
    logits: torch.Tensor  # [n, V]: what the main loss compares
    wanted: torch.Tensor  # float32 [m, V]
    picked: torch.Tensor  # int64 [n]
    scale: torch.Tensor  # float32 [n]


class Head:
    def __init__(self, section: BlockSection, config: DFlashConfig) -> None:
        """`config` has the backbone's sizes."""

    def parts(self) -> dict[str, nn.Module]:
        """The head's modules under their names in a checkpoint; the draft registers them."""
        return {}

    def convolution(self) -> nn.Module | None:
        """A new module around each sublayer of the backbone (see dflash2.py); None: there is none."""
        return None

    def initialise(self) -> None:
        """Set first weights that are not random, after the random ones."""

    def describe(self) -> dict[str, Any]:
        """The head's sizes as JSON values, by the servers' names."""
        return {}

    def latents(self, places: Places) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # noqa: ARG002
        """(latents [A, D, r], the state [A, *] that these places leave); None where there is none."""
        return None, None

    def rows(self) -> torch.Tensor | None:
        """[V, r]: a latent's product with a token's row is added to that token's logit."""
        return None

    def logits(self, base: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
        """[n, V], by which a guess is chosen, from the backbone's `base` [n, V] and `latents` [n, r]."""
        rows = self.rows()
        return base if rows is None or latents is None else base + nn.functional.linear(latents, rows)

    def trained(self, base: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
        """[n, V]: the logits that the main loss compares with the target's."""
        return self.logits(base, latents)

    def more_loss(self, rows: Rows) -> torch.Tensor | None:  # noqa: ARG002
        """A sum of further terms, float32 []; None: there are none."""
        return None
