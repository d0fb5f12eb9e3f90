"""The rows of a sample that EAGLE-3 takes its targets from."""

from __future__ import annotations

import torch


def counted_rows(loss_mask: torch.Tensor) -> torch.Tensor:
    """Bool [T] from `loss_mask` [T+1]: True where the *following* token is one the draft learns to predict.

    The M rows whose last hidden states were captured, in order.
    """
    return loss_mask[1:].bool()
