"""The test of a text's likelihood: sound text passes whatever it is, text of a broken sampler does not."""

from __future__ import annotations

import pytest
import torch

from paceline.engines.served.likelihood import evidence_against, implausible, mean_difference

EPS = torch.finfo(torch.bfloat16).eps


def logits_of(count: int, vocab: int = 400, sharpness: float = 6.0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(1)) * sharpness


def drawn(logits: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.5])
def test_text_of_the_target_passes(temperature: float) -> None:
    """Two hundred texts of 64 tokens; also where the server's logits are rounded."""
    logits = logits_of(64)
    rounded = logits.bfloat16().float()
    for seed in range(200):
        assert implausible(logits, drawn(rounded / temperature, seed), temperature, EPS) == ""


@pytest.mark.parametrize(
    ("words", "sharpness", "tokens"),
    [
        ("no better explained by it than by chance", 6.0, lambda x: torch.arange(32) * 7 % 400),
        ("twice the temperature", 3.0, lambda x: drawn(x / 3.0, 5)),
        ("half the temperature", 1.0, lambda x: x.argmax(-1)),
    ],
)
def test_text_of_a_broken_sampler_is_found(words: str, sharpness: float, tokens: object) -> None:
    """Noise, a temperature that is too high, and a sampler that is greedy whatever it was asked for."""
    logits = logits_of(32, sharpness=sharpness)
    chosen = tokens(logits)  # type: ignore[operator]
    assert implausible(logits, chosen, 0.8, EPS)
    assert any(words in name and value > 22 for name, value in evidence_against(logits, chosen, 0.8).items())


def test_greedy_text_must_be_the_argmax_except_for_ties() -> None:
    """A tie within the arithmetic's precision is decided either way."""
    logits = logits_of(20)
    best = logits.argmax(-1)
    assert implausible(logits, best, 0.0, EPS) == ""
    best[3:6] = 0
    assert "3 of 20 tokens of a greedy answer" in implausible(logits, best, 0.0, EPS)


def test_a_distribution_that_is_not_finite_is_no_evidence() -> None:
    """It is told for itself."""
    logits = logits_of(4)
    logits[2, 1] = float("nan")
    assert "not finite" in implausible(logits, logits.argmax(-1), 0.8, EPS)


def test_the_servers_own_log_probabilities_are_compared() -> None:
    """On average over the tokens."""
    logits, told = logits_of(8), []
    tokens = logits.argmax(-1)
    told = torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0].tolist()
    assert mean_difference(logits, tokens, told) < 1e-5
    assert mean_difference(logits, tokens, [value - 1 for value in told]) == pytest.approx(1.0, abs=1e-4)
