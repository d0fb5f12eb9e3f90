"""The rows of a sample that EAGLE-3 takes its targets from, and the target's last states there."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def counted_rows(loss_mask: torch.Tensor) -> torch.Tensor:
    """Bool [T] from `loss_mask` [T]: True where the *following* token belongs to the answer.

    The token after a sample's last row was generated but never processed: always an answer token.
    """
    return torch.cat((loss_mask[1:].bool(), torch.ones(1, dtype=torch.bool)))


def counted_states(sample: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`last_hidden_states` [M, H] of the M counted rows, in order, pre-norm.

    Capture keeps only these. A sample of an older run, or of an engine that was not asked, has all T.
    """
    states, counted = sample["last_hidden_states"], counted_rows(sample["loss_mask"])
    return states[counted] if states.shape[0] == counted.numel() else states
