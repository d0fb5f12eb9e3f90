"""Choosing tokens: the plain argmax, and the plain inverse of the cumulative distribution, only faster."""

from __future__ import annotations

import pytest
import torch

from paceline.engines.engine import CaptureRequest
from paceline.engines.token_choice import TokenChoice

STEPS = 8


def choice(temperatures: list[float], vocab_size: int) -> TokenChoice:
    group = [
        CaptureRequest(f"s{n}", (3,), (), STEPS, temperature, seed=n)
        for n, temperature in enumerate(temperatures)
    ]
    return TokenChoice(group, vocab_size, torch.device("cpu"))


def logits_of(seed: int, rows: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab_size, generator=generator) * 3).bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_greedy_row_gets_the_first_of_the_best_tokens(dtype: torch.dtype) -> None:
    """In bfloat16 ties are common; torch's argmax takes the lowest token id, and so does this."""
    logits = logits_of(1, 16, 500).to(dtype)
    logits[:, [40, 300, 301]] = logits.max()
    logits[3, 200] = float("nan")
    assert torch.equal(choice([0.0] * 16, 500).choose(logits, 0), logits.argmax(-1))


@pytest.mark.parametrize("vocab_size", [5, 64, 61, 1000])
def test_a_sampled_row_gets_the_token_where_its_number_falls(vocab_size: int) -> None:
    """For every step's number, cumulative before <= number < cumulative with it, within rounding."""
    temperatures = [0.5, 1.0, 1.5, 0.8]
    chosen = choice(temperatures, vocab_size)
    for step in range(STEPS):
        logits = logits_of(step, 4, vocab_size)
        tokens = chosen.choose(logits, step)[:, None]
        exact = (logits.double() / torch.tensor(temperatures).double()[:, None]).softmax(-1)
        upper = exact.cumsum(-1).gather(1, tokens)
        numbers = chosen._points[step].double()
        assert (numbers < upper + 1e-6).all()
        assert (numbers > upper - exact.gather(1, tokens) - 1e-6).all()


def test_neighbours_change_nothing() -> None:
    """A row's tokens are the same among greedy rows, among sampled ones and with others' logits."""
    logits = logits_of(1, 6, 1000)
    mixed = choice([0.0, 0.9, 0.0, 0.9, 0.9, 0.0], 1000)
    sampled, greedy = choice([0.9] * 6, 1000), choice([0.0] * 6, 1000)
    for step in range(STEPS):
        got, drawn, best = (c.choose(logits, step) for c in (mixed, sampled, greedy))
        assert got.tolist() == [int((best, drawn)[n in (1, 3, 4)][n]) for n in range(6)]


@pytest.mark.parametrize("point", [0.0, 0.3, 1 - 2**-24])
@pytest.mark.parametrize("vocab_size", [61, 1000])
def test_a_token_without_probability_is_never_drawn(point: float, vocab_size: int) -> None:
    """At neither end of the distribution, however the sums round."""
    rows = 2000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab_size, generator=generator) * 4
    logits[torch.rand(rows, vocab_size, generator=generator) > 0.4] = float("-inf")
    logits[:, 0] = logits[:, -1] = float("-inf")
    logits[:, 7] = 0.0
    chosen = choice([1.0] * rows, vocab_size)
    chosen._points[:] = point
    assert torch.isfinite(logits.gather(1, chosen.choose(logits, 0)[:, None])).all()


def test_logits_that_are_no_numbers_still_give_a_token() -> None:
    """The states are refused at the end of the group, with the sample's name; until then it goes on."""
    logits = torch.full((2, 61), float("nan"))
    assert choice([1.0, 1.0], 61).choose(logits, 0).max() < 61
    assert choice([0.0, 0.0], 61).choose(logits, 0).max() < 61
