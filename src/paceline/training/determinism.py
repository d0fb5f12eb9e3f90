"""Sets up a training process so that the same steps give the same bits."""

from __future__ import annotations

import torch


def compute_deterministically(threads: int) -> None:
    """Deterministic algorithms only, and a fixed number of threads: sums run in one order.

    PyTorch would also fill every new tensor with NaN, to reveal reads of unwritten memory. That costs a pass
    over its memory and changes no result, so it is switched off.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
