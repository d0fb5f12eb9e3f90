"""The exponential moving average (EMA) of the draft's weights: what the run gives away where it is on.

A checkpoint's draft then holds the average, so that evaluation, export and a later `start_from` need not know
of it, and the weights that are trained lie beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Put = Callable[[torch.Tensor, torch.Tensor], Any]
_WARM_UP = 10  # steps: at step n at most n / (n + 10) of the average is kept, or it would remember the first


class WeightAverage:
    def __init__(self, draft: nn.Module, decay: float) -> None:
        """Begins as the weights of `draft`, on their device."""
        self._draft, self._decay = draft, decay
        self._averages = {name: weight.detach().clone() for name, weight in draft.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (the first is 1)."""
        kept = min(self._decay, step / (step + _WARM_UP))
        for name, weight in self._draft.named_parameters():
            self._averages[name].lerp_(weight, 1.0 - kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The draft's, with the averages in place of the weights."""
        return {**self._draft.state_dict(), **self._averages}

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that training goes on from, by name."""
        return {name: weight.detach() for name, weight in self._draft.named_parameters()}

    @torch.no_grad()
    def restore_trained(self, tensors: Mapping[str, torch.Tensor], put: Put | None = None) -> None:
        """Put back what `trained` gave, into a draft that holds the averages. Raises KeyError.

        `put`: copies a whole tensor into a weight that is divided among ranks.
        """
        for name, weight in self._draft.named_parameters():
            (put or torch.Tensor.copy_)(weight, tensors[name])
