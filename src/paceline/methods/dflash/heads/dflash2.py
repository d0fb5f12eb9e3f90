"""DFlash 2's head: convolutions over a block around every sublayer, and a selector among likely tokens.

Around each attention and MLP, a place's inputs are mixed with those of the places before it in its block: a
kernel of a few taps for every channel, plus a change of it, shared by groups of channels, that a linear map
makes of the place's inputs. It starts as the identity. The selector keeps the likeliest tokens of a place
and adds to the logit of each a score of low rank, from the token before the place, the place's state and
the token itself. There is no paper; shapes and arithmetic are those of the loaders of vLLM 0.33 and SGLang
0.5.23.

Legend: A blocks, B places of a block, D guesses of a block, L = A * B, H hidden, V vocabulary, r rank of the
selector, k candidates, n rows, m target rows, t taps, g groups of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.methods.dflash.config import DFlashConfig
from paceline.methods.dflash.heads.head import Head, Places, Rows
from paceline.methods.dflash.settings import DFlash2Section
from paceline.precision import without_autocast

if TYPE_CHECKING:
    from paceline.methods.dflash.settings import BlockSection


class BlockConvolution(nn.Module):
    """A kernel before a sublayer and one after it, both made of what comes before."""

    def __init__(self, block_size: int, hidden_size: int, taps: int, group_size: int) -> None:
        super().__init__()
        self.block_size, self.taps, self.groups = block_size, taps, hidden_size // group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden_size))
        self.kernel_projection = nn.Linear(hidden_size, 2 * taps * self.groups, bias=False)

    def initialise(self) -> None:
        """The identity: each place keeps its own inputs."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def forward(self, inputs: torch.Tensor, sublayer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """[1, L, H] of `inputs` [1, L, H], whole blocks after each other."""
        changes = self.kernel_projection(inputs).unflatten(-1, (2, self.taps, self.groups))
        mixed = self._mixed(inputs, changes[..., 0, :, :], self.base_kernel[0])
        return self._mixed(sublayer(mixed), changes[..., 1, :, :], self.base_kernel[1])

    def _mixed(self, states: torch.Tensor, changes: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """`states` [1, L, H]; `changes` [1, L, t, g] of the kernel `base` [t, H]."""
        blocks = states.view(-1, self.block_size, self.groups, states.shape[-1] // self.groups)
        by_place = changes.view(-1, self.block_size, self.taps, self.groups, 1)
        kernel = base.to(states.dtype).view(self.taps, *blocks.shape[2:])
        result = (kernel[0] + by_place[:, :, 0]) * blocks
        for tap in range(1, min(self.taps, self.block_size)):
            part = (kernel[tap] + by_place[:, tap:, tap]) * blocks[:, :-tap]
            result = result + nn.functional.pad(part, (0, 0, 0, 0, tap, 0))
        return result.view(states.shape)


class CandidateSelector(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)


class DFlash2Head(Head):
    def __init__(self, section: BlockSection, config: DFlashConfig) -> None:
        """Raises ConfigError if the groups of channels do not fit the target."""
        assert isinstance(section, DFlash2Section)
        if config.hidden_size % section.conv_group_size:
            raise ConfigError(
                f"method.conv_group_size={section.conv_group_size} does not divide the hidden size "
                f"{config.hidden_size}.",
                why="Each group of channels shares one change of its kernel.",
                next="choose a divisor of the target's hidden size.",
            )
        self.section, self.config = section, config
        self.selector = CandidateSelector(config.vocab_size, config.hidden_size, section.selector_rank)
        self._convolutions: list[BlockConvolution] = []

    def parts(self) -> dict[str, nn.Module]:
        return {"candidate_selector": self.selector}

    def convolution(self) -> nn.Module:
        sizes = self.config.block_size, self.config.hidden_size
        made = BlockConvolution(*sizes, self.section.conv_kernel_size, self.section.conv_group_size)
        self._convolutions.append(made)
        return made

    def initialise(self) -> None:
        for convolution in self._convolutions:
            convolution.initialise()

    def describe(self) -> dict[str, Any]:
        return {
            "conv_kernel_size": self.section.conv_kernel_size,
            "conv_group_size": self.section.conv_group_size,
            "selector_rank": self.section.selector_rank,
            "selector_top_k": self._candidates,
        }

    @property
    def _candidates(self) -> int:
        return min(self.section.selector_top_k, self.config.vocab_size)

    def latents(self, places: Places) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        before = nn.functional.embedding(places.previous, self.selector.predecessor_codebook)
        return before * self.selector.hidden_projection(places.hidden), None

    def rows(self) -> torch.Tensor:
        return self.selector.successor_codebook

    def logits(self, base: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
        """Those of the candidates; -inf for every other token."""
        assert latents is not None
        best = base.topk(self._candidates, dim=-1)
        scores = self._scores(best.values, best.indices, latents)
        return torch.full_like(base, float("-inf"), dtype=scores.dtype).scatter(-1, best.indices, scores)

    def _scores(self, base: torch.Tensor, tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """float32 [n, k] of the candidates `tokens` int64 [n, k], whose own logits are `base` [n, k]."""
        rows = nn.functional.embedding(tokens, self.selector.successor_codebook)
        with without_autocast(base.device):  # it would round both factors again
            return base.float() + (rows.float() @ latents.float()[:, :, None])[..., 0]

    def trained(self, base: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG002
        """The backbone's own: they decide which tokens are candidates."""
        return base

    def more_loss(self, rows: Rows) -> torch.Tensor | None:
        """`selector_weight` times the cross entropy of the candidates' scores to the target's distribution
        among them. If the target's likeliest token is no candidate, it takes the last one's place."""
        assert rows.latents is not None
        with torch.no_grad():
            tokens = rows.base.topk(self._candidates, dim=-1).indices
            choice = rows.wanted.argmax(-1)[rows.picked]
            missing = (tokens != choice[:, None]).all(-1)
            tokens[:, -1] = torch.where(missing, choice, tokens[:, -1])
            wanted = rows.wanted[rows.picked[:, None], tokens].softmax(-1)
        scores = self._scores(rows.base.gather(-1, tokens), tokens, rows.latents)
        losses = -(wanted * scores.log_softmax(-1)).sum(-1)
        return self.section.selector_weight * (losses * rows.scale).sum()
