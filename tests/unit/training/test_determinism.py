"""What the consumer and the benchmark of its step are set to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from paceline.training.determinism import compute_deterministically


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_num_threads(threads)


def test_fresh_tensors_are_not_filled_where_determinism_is_asked_for() -> None:
    """The pass over fresh memory costs time in every step and protects nobody here."""
    compute_deterministically(1)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.get_num_threads() == 1
