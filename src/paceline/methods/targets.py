"""The rows of a sample that a draft learns from, and what first weights shall predict there."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def counted_rows(loss_mask: torch.Tensor) -> torch.Tensor:
    """Bool [T] from `loss_mask` [T+1]: True where the draft learns to predict the *following* token.

    Those are the M rows whose last hidden states were captured, in order.
    """
    return loss_mask[1:].bool()


def direction(states: torch.Tensor) -> torch.Tensor:
    """`states` [..., H] scaled to a root mean square of 1."""
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


def wanted_directions(sample: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows int64 [A] that learn, and the directions [A, H] that they shall predict.

    Row i learns from row i+1 if that row counts. No row learns from row 0.
    """
    counted = counted_rows(sample["loss_mask"])
    wanted = sample["last_hidden_states"][int(counted[0]) :]
    return counted[1:].nonzero().squeeze(1), direction(wanted.float())
