"""Attention of one token for a whole group: the sums are the library's, and padding is not read."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 (the name PyTorch's own documents use)

from paceline.engines.attention import ROWS, grouped_attention
from paceline.engines.cache import PreallocatedLayer

GROUPS, WIDTH, LENGTH = 2, 8, 40
COUNT = 2 * ROWS + 5  # the last part is not whole


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("heads", [GROUPS, 3 * GROUPS])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_single_token_attends_as_in_the_library(heads: int, by_column: bool, is_masked: bool) -> None:
    """Rows begin later and later, as in a group by length; a gap follows the first two positions."""
    query = _drawn(COUNT, heads, 1, WIDTH)
    layer = PreallocatedLayer(COUNT, LENGTH + 7, by_column=by_column)
    key, value = layer.update(_drawn(COUNT, GROUPS, LENGTH, WIDTH), _drawn(COUNT, GROUPS, LENGTH, WIDTH) + 1)
    mask = torch.ones(COUNT, 1, 1, LENGTH, dtype=torch.bool)
    for row in range(COUNT):
        begin = 30 - row // 3
        mask[row, ..., :begin] = mask[row, ..., begin + 2 : begin + 4] = False
    given = mask if is_masked else None

    found, _ = grouped_attention(torch.nn.Module(), query, key, value, given, WIDTH**-0.5)

    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=given, enable_gqa=True)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_what_no_row_of_a_part_attends_to_is_not_read() -> None:
    """NaN before the first position that one of them attends to changes nothing."""
    query, key, value = _drawn(3, 2, 1, WIDTH), _drawn(3, 1, LENGTH, WIDTH), _drawn(3, 1, LENGTH, WIDTH)
    key[:, :, :9] = value[:, :, :9] = float("nan")
    mask = (torch.arange(LENGTH) >= 9).expand(3, 1, 1, LENGTH)

    found, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, WIDTH**-0.5)

    assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_are_not_rounded_to_the_type_of_the_keys(dtype: torch.dtype) -> None:
    """A bias that all keys have adds 8,192 to every score, and the softmax is that of the differences."""
    query, key, value = _drawn(3, 2, 1, WIDTH), _drawn(3, 1, LENGTH, WIDTH), _drawn(3, 1, LENGTH, WIDTH)
    query[..., 0], key[..., 0] = 128.0, 1024.0
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    found, _ = grouped_attention(torch.nn.Module(), query, key, value, None, 1.0 / 16.0)

    wanted = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), scale=1.0 / 16.0, enable_gqa=True
    )
    torch.testing.assert_close(found.float(), wanted.transpose(1, 2), rtol=0.0, atol=0.02)
