"""95 % confidence intervals over prompts, by the bootstrap: prompts are drawn again with replacement.

Efron 1979, "Bootstrap methods: another look at the jackknife", the percentile interval. Prompts
differ far more than the cycles of one prompt do, so prompts are what is drawn. With few of them the interval
is too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED = 2000, 0
Interval = tuple[float, float] | None
Floats = NDArray[np.float64]


class Resampling:
    """The same draws for every figure of the same prompts, so that differences are paired."""

    def __init__(self, num_prompts: int) -> None:
        shares = np.full(num_prompts, 1.0 / max(1, num_prompts))
        draws = np.random.default_rng(SEED).multinomial(num_prompts, shares, size=RESAMPLES)
        self._draws: Floats = draws.astype(np.float64)  # [RESAMPLES, prompts]: how often each was drawn

    def ratio(self, numerators: Sequence[float], denominators: Sequence[float]) -> Floats:
        """Sum over sum in each draw, [RESAMPLES]; not a number where there is nothing to divide by."""
        return quotient(
            self._draws @ np.asarray(numerators, np.float64),
            self._draws @ np.asarray(denominators, np.float64),
        )

    def interval(self, values: Floats) -> Interval:
        """The middle 95 % of a figure's values; None with fewer than two prompts or values."""
        known = values[np.isfinite(values)]
        if self._draws.shape[1] < 2 or known.size < 2:
            return None
        low, high = np.percentile(known, (2.5, 97.5))
        return float(low), float(high)


def quotient(above: Floats, below: Floats) -> Floats:
    """Draw by draw, [RESAMPLES]; not a number where there is nothing to divide by."""
    result: Floats = np.full(RESAMPLES, np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result
