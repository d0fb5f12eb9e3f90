"""The next token of every row of a capture group: the best one, or one drawn with the row's own noise.

A row's tokens follow from its own logits, temperature and seed alone, whatever its neighbours do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812 (the name PyTorch's own documents use)

from paceline.engines.engine import CaptureRequest

BLOCK = 64  # tokens; the drawn one is looked for among blocks first, then in its block
BELOW_ONE = 1 - 2**-24  # times any float32 it is less than that


class TokenChoice:
    """Legend: B rows of the group, S of them sampled (temperature > 0), V tokens, in N blocks."""

    def __init__(self, group: Sequence[CaptureRequest], vocab_size: int, device: torch.device) -> None:
        rows = torch.arange(len(group), device=device)
        is_sampled = torch.tensor([request.temperature > 0 for request in group], device=device)
        self._greedy, self._sampled = rows[~is_sampled], rows[is_sampled]
        sampled = [request for request in group if request.temperature > 0]
        if not sampled:
            return
        size = max(request.max_new_tokens for request in group)
        self._points = torch.stack([_noise(request, size) for request in sampled], dim=1).to(device)
        temperatures = [request.temperature for request in sampled]
        self._temperature = torch.tensor(temperatures, device=device)[:, None]
        # Kept from step to step: fresh memory of this size costs more in page faults than the arithmetic.
        num_blocks = -(-vocab_size // BLOCK)
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

        The numbers are summed by blocks: a running sum over all of them cannot be vectorised.
        """
        self._logits[:, : logits.shape[-1]] = logits
        self._logits.div_(self._temperature)
        torch.softmax(self._logits, -1, out=self._weights)
        blocks = self._weights.view(len(logits), -1, BLOCK)
        block, rest = _invert(blocks.sum(-1), self._points[step][:, None])
        members = blocks[torch.arange(len(logits), device=logits.device), block[:, 0]]
        within, _ = _invert(members, rest)
        # Beyond the vocabulary lies only what is chosen from logits that are no numbers.
        return (block * BLOCK + within)[:, 0].clamp(max=logits.shape[-1] - 1)


def _invert(weights: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where `points` [S, 1] in [0, 1) lie in the distribution that `weights` [S, n] are in proportion to.

    Returns the place, int64 [S, 1], never one of weight 0, and how far into it the point lies: [0, 1) again.
    """
    cumulative = weights.cumsum(-1)
    points = points * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, points, right=True).clamp(max=weights.shape[-1] - 1)
    before = F.pad(cumulative, (1, 0)).gather(1, place)
    return place, ((points - before) / weights.gather(1, place)).clamp(0.0, BELOW_ONE)


def _best(logits: torch.Tensor) -> torch.Tensor:
    """The first of the highest logits, int64 [B]."""
    if logits.device.type == "cpu":
        # The same token as torch's argmax, found some 20 times as fast.
        return torch.from_numpy(logits.float().numpy().argmax(-1))
    return logits.argmax(-1)


def _noise(request: CaptureRequest, size: int) -> torch.Tensor:
    """One random number for each token that the request may get, zeros up to `size`."""
    generator = torch.Generator().manual_seed(request.seed)
    numbers = torch.zeros(size)
    numbers[: request.max_new_tokens] = torch.rand(request.max_new_tokens, generator=generator)
    return numbers
