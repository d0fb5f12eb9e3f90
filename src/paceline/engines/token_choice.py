"""The next token of every row of a capture group: the argmax, or a sample drawn with the row's own noise.

A row's tokens depend on its own logits, temperature and seed alone, never on other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.engines.engine import CaptureRequest

BLOCK = 64  # tokens; sampling searches first for the block, then for the token in it
BELOW_ONE = 1 - 2**-24  # the product with any float32 is less than that number


class TokenChoice:
    """Legend: B rows of the group, S of them sampled (temperature > 0), V tokens, in N blocks."""

    def __init__(self, group: Sequence[CaptureRequest], vocab_size: int, device: torch.device) -> None:
        kinds = [request.temperature > 0 for request in group]
        self._greedy, self._sampled = (
            torch.tensor([row for row, kind in enumerate(kinds) if kind == wanted], device=device).long()
            for wanted in (False, True)
        )
        sampled = [request for request in group if request.temperature > 0]
        if not sampled:
            return
        size = max(request.max_new_tokens for request in group)
        self._points = torch.stack([_noise(request, size) for request in sampled], dim=1)[..., None].to(
            device
        )
        temperatures = [request.temperature for request in sampled]
        self._temperature = torch.tensor(temperatures, device=device)[:, None]
        # Kept from step to step: fresh memory of this size costs more in page faults than the arithmetic.
        num_blocks = -(-vocab_size // BLOCK)
        self._rows = torch.arange(len(sampled), device=device)
        self._logits = torch.full((len(sampled), num_blocks * BLOCK), float("-inf"), device=device)
        self._weights = torch.empty_like(self._logits)

    def choose(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Tokens int64 [B] from `logits` [B, V], with each row's noise of `step`."""
        if not len(self._sampled):
            return _best(logits)
        if not len(self._greedy):
            return self._draw(logits, step)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        tokens[self._greedy] = _best(logits[self._greedy])
        tokens[self._sampled] = self._draw(logits[self._sampled], step)
        return tokens

    def _draw(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Inverse of each row's cumulative distribution at the row's own random number; int64 [S].

        Searches for the block first, then for the token in it: a running sum over all tokens cannot be
        vectorised.
        """
        self._logits[:, : logits.shape[-1]] = logits
        torch.softmax(self._logits.div_(self._temperature), -1, out=self._weights)
        blocks = self._weights.view(len(logits), -1, BLOCK)
        sums = blocks.sum(-1)
        cumulative = sums.cumsum(-1)
        points = self._points[step] * cumulative[:, -1:]
        # Only if logits are NaN does the point lie beyond the last block or the last token.
        block = torch.searchsorted(cumulative, points, right=True).clamp(max=sums.shape[-1] - 1)
        # How far into its block the point lies: less than 1 under any rounding, so a token of weight 0,
        # such as padding, is never drawn.
        into = (points - cumulative.gather(1, block)) / sums.gather(1, block) + 1.0
        members = blocks[self._rows, block[:, 0]].cumsum(-1)
        within = torch.searchsorted(members, into.clamp(0.0, BELOW_ONE) * members[:, -1:], right=True)
        return (block * BLOCK + within)[:, 0].clamp(max=logits.shape[-1] - 1)


def _best(logits: torch.Tensor) -> torch.Tensor:
    """The first of the highest logits, int64 [B]."""
    if logits.device.type == "cpu":
        # The same token as torch's argmax, about 20 times as fast.
        return torch.from_numpy(logits.float().numpy().argmax(-1))
    return logits.argmax(-1)


def _noise(request: CaptureRequest, size: int) -> torch.Tensor:
    """One random number for each token that the request may get, then zeros up to `size`."""
    generator = torch.Generator().manual_seed(request.seed)
    numbers = torch.zeros(size)
    numbers[: request.max_new_tokens] = torch.rand(request.max_new_tokens, generator=generator)
    return numbers
