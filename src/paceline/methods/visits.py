"""Random choices of training that a resumed run makes again: each follows from sample and visit alone.

No generator has a state that goes on from step to step, so neither the size of micro-batches nor a restart
changes a choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

# Odd numbers of 61 bits and more, by which neighbouring visits and purposes become distant seeds.
_OF_VISIT, _OF_PURPOSE = 0x9E3779B97F4A7C15, 0x2545F4914F6CDD1D
ANCHORS, NOISE = 1, 2  # purposes


def generator_of(tokens: torch.Tensor, visit: int | None, purpose: int) -> torch.Generator:
    """A fresh generator for one use of the sample with these `tokens` int64 [T+1]; the same whenever it is
    asked for. `visit` None: that of all uses outside training."""
    by_place = int((tokens * torch.arange(1, tokens.numel() + 1) * 2654435761).sum())
    mixed = by_place ^ (0 if visit is None else (visit + 1) * _OF_VISIT) ^ purpose * _OF_PURPOSE
    return torch.Generator().manual_seed(mixed & (2**63 - 1))


def noisy(
    samples: Sequence[Mapping[str, torch.Tensor]], size: float, visit: int | None
) -> Sequence[Mapping[str, torch.Tensor]]:
    """The samples with Gaussian noise on the states that the draft reads, `size` times each state's root mean
    square; the very samples where `size` is 0, and outside training (`visit` None)."""
    if not size or visit is None:
        return samples
    return [_noisy(sample, size, visit) for sample in samples]


def _noisy(sample: Mapping[str, torch.Tensor], size: float, visit: int) -> dict[str, torch.Tensor]:
    states, width = sample["aux_hidden_states"], int(sample["last_hidden_states"].shape[-1])
    generator = generator_of(sample["input_ids"].long(), visit, NOISE)
    exact = states.float().unflatten(-1, (-1, width))  # [T, n, H]
    scale = size * exact.square().mean(-1, keepdim=True).sqrt()
    moved = exact + scale * torch.randn(exact.shape, generator=generator)
    return {**sample, "aux_hidden_states": moved.flatten(1).to(states.dtype)}
