"""Reduction: the gradients of all ranks, summed on each of them, once every rank has its own.

A rank first computes all its micro-batches alone and then says how that went. Only if no rank failed are
gradients exchanged. So a sample that fails on one rank is an error on all of them, as quickly as with one
rank, and isolation finds it. The sums follow from the gradients and the number of ranks alone: each gradient
is summed as a whole, small ones together in the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import nn

from paceline.training.link import Link, meet
from paceline.training.told_errors import ToldError, raised_again, told

Together = Callable[[Callable[[], float]], float]
SMALL = 1 << 18  # elements: gradients below are summed together


@dataclass(frozen=True)
class Sums:
    """Over the samples' counted tokens: the loss, how many tokens they are, and the method's metrics."""

    loss_sum: float
    num_tokens: int
    metrics: dict[str, float]


class _Said(msgspec.Struct, omit_defaults=True):
    """One rank's part of a step. `reached`: for each parameter "1" if it has a gradient here."""

    loss_sum: float = 0.0
    num_tokens: int = 0
    metrics: dict[str, float] = {}
    reached: str = ""
    error: ToldError | None = None


class Reduction:
    def __init__(
        self,
        link: Link,
        exchange: Callable[[Sequence[nn.Parameter]], None],
        together: Together | None = None,
    ) -> None:
        """`exchange` sums the gradients of these parameters over all ranks (one of them may have none).

        `together`: calls what it is given, see `Reduction.together`; None: nothing is exchanged in there.
        """
        self._link = link
        self._exchange = exchange
        self._together = together

    def __call__(self, step: str, draft: nn.Module, own: Sums | Exception) -> Sums:
        """The sums of all ranks; the gradients become those of all ranks, or this rank's rows of them.

        `own`: this rank's sums, or why it has none. Raises that error on every rank, before any gradient is
        exchanged.
        """
        parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
        parts = self._said(step, parameters, own)
        for rank, said in enumerate(parts):
            if said.error is not None:
                raise (
                    own
                    if isinstance(own, Exception) and rank == self._link.rank
                    else raised_again(said.error, rank)
                )
        reached = [any(said.reached[place] == "1" for said in parts) for place in range(len(parameters))]
        self._exchange([p for p, is_reached in zip(parameters, reached, strict=True) if is_reached])
        names = dict.fromkeys(name for said in parts for name in said.metrics)
        return Sums(
            sum(said.loss_sum for said in parts),
            sum(said.num_tokens for said in parts),
            {name: sum(said.metrics.get(name, 0.0) for said in parts) for name in names},
        )

    def together(self, act: Callable[[], float]) -> float:
        """What `act` returns, in which the ranks exchange more of the summed gradients if these are divided.

        Then a rank that fails in there is a lost one: raises RanksError.
        """
        return act() if self._together is None else self._together(act)

    def _said(self, step: str, parameters: Sequence[nn.Parameter], own: Sums | Exception) -> list[_Said]:
        if isinstance(own, Exception):
            said = _Said(error=told(own))
        else:
            reached = "".join("0" if parameter.grad is None else "1" for parameter in parameters)
            said = _Said(own.loss_sum, own.num_tokens, own.metrics, reached)
        return [
            msgspec.msgpack.decode(one, type=_Said)  # a loss may be NaN, which JSON cannot carry
            for one in meet(self._link, step, msgspec.msgpack.encode(said))
        ]


class AddedGradients:
    """Each rank gets all sums."""

    def __init__(self, add: Callable[[Sequence[torch.Tensor]], None]) -> None:
        """`add` sums each of these tensors over all ranks, in place, with the same bits on each of them."""
        self._add = add

    def __call__(self, parameters: Sequence[nn.Parameter]) -> None:
        large, small = list[torch.Tensor](), list[torch.Tensor]()
        for parameter in parameters:
            if parameter.grad is None:  # another rank's samples reach it
                parameter.grad = torch.zeros_like(parameter)
            is_large = parameter.numel() >= SMALL and parameter.grad.is_contiguous()
            (large if is_large else small).append(parameter.grad)
        if not small:
            self._add(large)
            return
        together = torch.cat([gradient.flatten() for gradient in small])
        self._add([*large, together])
        for gradient, summed in zip(
            small, together.split([gradient.numel() for gradient in small]), strict=True
        ):
            gradient.copy_(summed.view_as(gradient))
