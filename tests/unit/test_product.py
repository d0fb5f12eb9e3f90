"""A weight in the layout of its product multiplies like the plain one, and every row alike."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from paceline import product
from paceline.product import Weight


def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)


@pytest.mark.parametrize(("rows", "columns"), [(48, 32), (576, 1536), (960, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_matrix(rows: int, columns: int, dtype: torch.dtype) -> None:
    plain, inputs = matrix(rows, columns, dtype), matrix(9, columns, dtype) * columns**0.5
    found = Weight(plain)(inputs)
    expected = inputs.double() @ plain.double().T
    assert found.dtype == dtype
    bounds = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
    torch.testing.assert_close(found.double(), expected, atol=bounds[dtype], rtol=bounds[dtype])


@pytest.mark.parametrize("columns", [576, 1152, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_has_the_bits_that_it_has_among_others(columns: int, dtype: torch.dtype) -> None:
    """Plain decoding reads one row and verification several: their outputs must be the same bits."""
    weight, inputs = Weight(matrix(512, columns, dtype)), matrix(17, columns, dtype)
    together = weight(inputs)
    for count in (1, 2, 4, 8):
        assert torch.equal(weight(inputs[:count]), together[:count]), count


@pytest.mark.parametrize("harm", ["missing", "wrong"])
def test_without_the_operators_or_with_wrong_ones_the_plain_product_is_used(
    harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not part of PyTorch's documented interface: another version may lack or change them."""

    def other(rows: torch.Tensor, packed: object) -> torch.Tensor:
        if harm == "missing":
            raise AttributeError("no such operator")
        return torch.zeros(rows.shape[0], 64, dtype=rows.dtype)

    monkeypatch.setattr(product, "_multiply", other)
    for dtype in (torch.bfloat16, torch.float32):
        plain, inputs = matrix(64, 32, dtype), matrix(3, 32, dtype)
        assert torch.equal(Weight(plain)(inputs), F.linear(inputs, plain))
