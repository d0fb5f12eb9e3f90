"""The losses between draft and target against slow references: loops over rows and tokens in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from paceline.errors import ConfigError
from paceline.methods.losses.distribution import distribution_loss
from paceline.methods.losses.settings import LossName, LossSection

NAMES = get_args(LossName)
ETA = 2.0


def _section(name: str) -> LossSection:
    return LossSection.parse({"name": name, **({"eta": ETA} if name == "lk_lambda" else {})})


def _distribution(scores: list[float]) -> list[float]:
    highest = max(scores)
    parts = [math.exp(score - highest) for score in scores]
    return [part / sum(parts) for part in parts]


def _slow(name: str, scores: list[float], wanted: list[float], weight: float | None = None) -> float:
    """One row's loss by its definition; `weight`: of the divergence in `lk_lambda`, held fixed."""
    q, p = _distribution(scores), _distribution(wanted)
    alpha = sum(min(pair) for pair in zip(p, q, strict=True))
    divergence = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    if name == "lk_lambda":
        w = math.exp(-ETA * alpha) if weight is None else weight
        return w * divergence + (1 - w) * (1 - alpha)
    return {
        "soft_cross_entropy": -sum(a * math.log(b) for a, b in zip(p, q, strict=True)),
        "kl": divergence,
        "tv": 1 - alpha,
        "lk_alpha": -math.log(alpha),
    }[name]


def _slopes(loss: Callable[[list[float]], float], scores: list[float], size: float = 1e-5) -> list[float]:
    """The gradient by central differences."""
    found = []
    for place in range(len(scores)):
        up, down = list(scores), list(scores)
        up[place] += size
        down[place] -= size
        found.append((loss(up) - loss(down)) / (2 * size))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_equals_its_definition(name: str) -> None:
    """Every row's loss, the weighted sum, and the gradient, over more rows than a block has."""
    generator = torch.Generator().manual_seed(3)
    rows, size = 70, 9
    logits = (torch.randn(rows, size, generator=generator) * 2).requires_grad_()
    wanted = torch.randn(rows, size, generator=generator) * 2
    picked, scale = torch.randperm(rows, generator=generator), torch.rand(rows, generator=generator)
    total, losses = distribution_loss(_section(name), logits, wanted, picked, scale)
    (got,) = torch.autograd.grad(total * 0.5, logits)
    slopes = []
    for row in range(rows):
        scores, target = logits[row].tolist(), wanted[picked[row]].tolist()
        assert float(losses[row]) == pytest.approx(_slow(name, scores, target), rel=1e-4, abs=1e-6)
        both = zip(_distribution(scores), _distribution(target), strict=True)
        weight = math.exp(-ETA * sum(min(pair) for pair in both))
        slopes.append(_slopes(lambda s, t=target, w=weight: _slow(name, s, t, w), scores))
    expected = torch.tensor(slopes) * scale[:, None] * 0.5
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    assert float(total.detach()) == pytest.approx(float((losses * scale).sum()), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_rounds_logits_and_nothing_after_them(name: str) -> None:
    """Under autocast loss and gradient of the same logits are the same bits."""
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(30, 300, generator=generator) * 4).bfloat16().requires_grad_()
    wanted, picked = torch.randn(30, 300, generator=generator) * 4, torch.arange(30)
    found = []
    for is_mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            total, losses = distribution_loss(_section(name), logits, wanted, picked, torch.ones(30))
        found.append((losses, *torch.autograd.grad(total, logits)))
    assert all(torch.equal(plain, mixed) for plain, mixed in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 64, 65, 600])
def test_blocks_of_rows_change_nothing(name: str, rows: int) -> None:
    """A row's loss and gradient do not depend on the rows beside it."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 40, generator=generator, requires_grad=True)
    wanted = torch.randn(rows, 40, generator=generator)
    picked, scale = torch.randperm(rows, generator=generator), torch.rand(rows, generator=generator)
    total, losses = distribution_loss(_section(name), logits, wanted, picked, scale)
    (got,) = torch.autograd.grad(total, logits)
    for row in {0, rows // 2, rows - 1}:
        alone = logits[row : row + 1].detach().requires_grad_()
        one, loss = distribution_loss(
            _section(name), alone, wanted, picked[row : row + 1], scale[row : row + 1]
        )
        torch.testing.assert_close(loss[0], losses[row])
        torch.testing.assert_close(torch.autograd.grad(one, alone)[0][0], got[row])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_finite_where_draft_and_target_hardly_overlap(name: str, dtype: torch.dtype) -> None:
    """The draft is certain of a token, the target of another, and by so much that exponentials are 0."""
    logits = torch.zeros(3, 50, dtype=dtype)
    logits[:, 4], logits[1, 7] = 300.0, -300.0
    wanted = torch.zeros(2, 50, dtype=dtype)
    wanted[:, 7] = 300.0
    logits.requires_grad_()
    total, losses = distribution_loss(
        _section(name), logits, wanted, torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.5, 0.0])
    )
    total.backward()
    assert bool(torch.isfinite(losses).all())
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert bool(torch.isfinite(logits.grad).all())
    if name != "tv":  # whose gradient vanishes there, as the section says
        assert float(logits.grad[0, 7]) < -1e-2, "the wanted token's logit is to rise"
    assert not logits.grad[2].any()


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_have_no_slope(name: str) -> None:
    """Every loss is at its lowest where the draft says what the target says; all but one are 0 there."""
    wanted = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    logits = (wanted + 3.0).requires_grad_()  # a constant changes no distribution
    total, losses = distribution_loss(_section(name), logits, wanted, torch.arange(5), torch.ones(5))
    (slope,) = torch.autograd.grad(total, logits)
    # Next to its lowest point a total variation is a cone, whose slope is at most q.
    assert float(slope.abs().max()) < (0.5 if name in ("tv", "lk_alpha", "lk_lambda") else 1e-6)
    if name != "soft_cross_entropy":
        torch.testing.assert_close(losses, torch.zeros(5), atol=1e-5, rtol=0)


def test_a_plain_name_is_a_loss_and_a_knob_of_another_is_refused() -> None:
    """`loss: kl` is `loss: {name: kl}`; an `eta` that would be ignored names the loss that reads it."""
    assert LossSection.model_validate("kl") == LossSection.parse({"name": "kl"})
    assert LossSection.parse({"name": "lk_lambda"}).eta == 3.0
    with pytest.raises(ConfigError, match="lk_lambda"):
        LossSection.parse({"name": "kl", "eta": 2.0})
    with pytest.raises(ConfigError, match="soft_cross_entropy"):
        LossSection.parse({"name": "cross"})
