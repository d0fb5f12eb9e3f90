"""Products of a few rows with a fixed weight, as decoding token by token computes them.

On a CPU the library brings a weight into the layout of its product at every call, which costs as much as the
product of a few rows. A `Weight` is brought there once, by the operators that torch.compile's CPU
backend uses. Where they do not exist, or do not give the plain product, it stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

# oneDNN's product of four rows is faster than that of one (measured, SmolLM2's weights: 18.6 against 20.8 ms
# in bfloat16; 37 against 43 in float32, without lm_head), so a lone row enters four times.
ROWS = 4
# It sums a lone row that is longer than this in another order than several rows.
SAME_ORDER_SIZE = 1024
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of the largest output, by dtypes that are packed


class Weight:
    """`matrix` [out, in] is not to be changed afterwards."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix: torch.Tensor | None = matrix
        is_long = matrix.dtype == torch.bfloat16 and matrix.shape[1] > SAME_ORDER_SIZE
        self._least = 2 if is_long else 1  # rows that a lone row enters as
        self._packed = _packed(matrix)
        if self._packed is not None:
            self.matrix, self._least = None, ROWS  # one copy is enough

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [n, in] @ matrix.T: [n, out], in the dtype of both; a row's sums do not depend on n."""
        if rows.shape[0] == 1:
            return self._product(rows.expand(self._least, -1))[:1]
        return self._product(rows)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            assert self.matrix is not None
            return F.linear(rows, self.matrix)
        return _multiply(rows, self._packed)


def _multiply(rows: torch.Tensor, packed: Any) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    return product


def _packed(matrix: torch.Tensor) -> Any | None:
    """The weight in the layout of the product; None where that is not possible."""
    if matrix.device.type != "cpu" or matrix.dtype not in TOLERANCE:
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS)
        rows = torch.linspace(-1, 1, 2 * matrix.shape[1], device=matrix.device).view(2, -1).to(matrix.dtype)
        expected, found = F.linear(rows, matrix), _multiply(rows, packed)
    except (AttributeError, RuntimeError, TypeError):  # operators of another version of PyTorch
        return None
    off = (expected - found).abs().max()
    return packed if bool(off <= TOLERANCE[matrix.dtype] * expected.abs().max()) else None
