"""The rows of a sample whose states give EAGLE-3 its target distributions."""

from __future__ import annotations

import torch


def counted_rows(loss_mask: torch.Tensor) -> torch.Tensor:
    """Bool [T] from `loss_mask` [T+1]: True where the draft learns to predict the *following* token.

    Those are the M rows whose last hidden states were captured, in order.
    """
    return loss_mask[1:].bool()
