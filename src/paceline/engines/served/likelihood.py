"""Whether a server's text is what its target would write: a test that sound text passes by proof.

Let p be the target's distribution at the asked temperature, and q another distribution. If every token was
drawn from p, the product of q/p over the tokens has the expectation 1, so it exceeds 1/ALARM with a chance
below ALARM (Markov's inequality), whatever the text. Text of a broken sampler exceeds it within a few tokens,
if q is closer to what that sampler does: flat, twice as hot, or twice as cold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from paceline.target.agreement import count_disagreements

ALARM = 1e-9
STRAYS = 0.05  # of a greedy answer's tokens: ties that rounding decided outside its bound


def implausible(logits: torch.Tensor, tokens: torch.Tensor, temperature: float, eps: float) -> str:
    """Why `tokens` [n] were not written by a target with `logits` [n, V] at `temperature`; "" if they may be.

    `eps`: the precision of the server's arithmetic.
    """
    if not bool(torch.isfinite(logits).all()):
        return "the target's distribution over its captured states is not finite"
    if temperature == 0.0:
        wrong = count_disagreements(logits, tokens, eps)
        told = f"{wrong} of {len(tokens)} tokens of a greedy answer are not the argmax of its states"
        return told if wrong > STRAYS * len(tokens) else ""
    for name, evidence in evidence_against(logits, tokens, temperature).items():
        if evidence > -math.log(ALARM / 3):
            nll = -_of(torch.log_softmax(logits / temperature, -1), tokens)
            unlikely = f"a negative log likelihood of {float(nll.mean()):.2f} each under the target"
            return f"{len(tokens)} sampled tokens have {unlikely}, and are {name}"
    return ""


def evidence_against(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> dict[str, float]:
    """The logarithm of the product of q/p over the tokens, for each q."""
    wide = logits.double() / temperature
    own = _of(torch.log_softmax(wide, -1), tokens)
    others = {
        "no better explained by it than by chance": torch.full_like(own, -math.log(logits.shape[-1])),
        "better explained by twice the temperature": _of(torch.log_softmax(wide / 2, -1), tokens),
        "better explained by half the temperature": _of(torch.log_softmax(wide * 2, -1), tokens),
    }
    return {name: float((other - own).sum()) for name, other in others.items()}


def _of(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return log_probabilities.gather(-1, tokens[:, None]).squeeze(-1)


def mean_difference(logits: torch.Tensor, tokens: torch.Tensor, told: Sequence[float]) -> float:
    """How far the server's own log probabilities of `tokens` are from those of `logits`, on average."""
    own = _of(torch.log_softmax(logits.double(), -1), tokens)
    return float((own - torch.tensor(told, dtype=own.dtype)).abs().mean())
