"""States that no sound target gives never leave the engine."""

from __future__ import annotations

import pytest
import torch

from paceline.engines.capture_rows import is_sound

SOUND = [[1.0, 0.0, -2.0], [0.0, 3.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (SOUND, True),
        ([*SOUND, [0.0, 0.0, 0.0]], False),
        ([*SOUND, [0.0, float("nan"), 1.0]], False),
        ([*SOUND, [float("inf"), 0.0, 1.0]], False),
        ([*SOUND, [float("-inf"), 0.0, 1.0]], False),
    ],
)
def test_a_row_that_is_not_finite_or_all_zero_is_found(
    rows: list[list[float]], expected: bool, dtype: torch.dtype
) -> None:
    """Each row by itself: one among many sound ones is enough."""
    assert is_sound(torch.tensor(rows, dtype=dtype)) is expected


def test_a_sample_without_rowsis_sound() -> None:
    """A method may keep none of a sample's rows."""
    assert is_sound(torch.empty(0, 4))
