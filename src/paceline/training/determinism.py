"""How a process that trains is set up, so that the same steps give the same bits."""

from __future__ import annotations

import torch


def compute_deterministically(threads: int) -> None:
    """Deterministic algorithms only, and a fixed number of threads: sums run in one order.

    PyTorch would also fill every fresh tensor with NaN, to show reads of memory that was never written;
    that costs a pass over it each time and changes no result.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
