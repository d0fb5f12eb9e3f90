"""States in float8: how far a number may move, what is refused, and that nothing else is touched."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from paceline.errors import EngineError, FeatureCorruptError
from paceline.features.float8 import SCALES, narrowed, widened
from paceline.types import Feature, Rows, States, Targets, Tokens

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
LAYERS, HIDDEN = 3, 8


def feature(dtype: torch.dtype, *, layers: int = LAYERS, narrow: bool = True) -> Feature:
    return Feature(
        "states", States(tuple(range(layers))), dtype=str(dtype).removeprefix("torch."), narrowed=narrow
    )


def there_and_back(states: torch.Tensor, layers: int = LAYERS) -> torch.Tensor:
    stored = narrowed("s", {"states": states}, [feature(states.dtype, layers=layers)])
    return widened(stored)["states"]


def states_of(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows whose numbers span the whole range of float8 and more, of very different sizes [40, 3 * 8]."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(40, LAYERS * HIDDEN, generator=generator, dtype=torch.float64)
    numbers *= 2.0 ** torch.randint(-14, 3, numbers.shape, generator=generator)
    numbers *= 2.0 ** torch.randint(-6, 7, (40, 1), generator=generator)
    numbers[::5, 3] = 0.0
    return numbers.to(dtype)


def all_of_float8() -> list[Fraction]:
    """Every number of e4m3 that is not negative: 7 below the least normal one, 8 an octave, no infinity."""
    below = [Fraction(fraction, 512) for fraction in range(8)]
    normal = [
        Fraction(8 + fraction, 8) * Fraction(2) ** power for power in range(-6, 9) for fraction in range(8)
    ]
    return [*below, *normal[:-1]]  # the last one stands for no number


GRID = all_of_float8()


def slow(row: list[float]) -> list[float]:
    """One token of one layer by the definition, in exact numbers."""
    largest = max(abs(Fraction(number)) for number in row)
    power = -200
    while largest > 448 * Fraction(2) ** power:
        power += 1
    scale = Fraction(2) ** power
    found = []
    for number in row:
        wanted = abs(Fraction(number)) / scale
        # Of two that are as near, the one whose last bit is 0.
        nearest = min(range(len(GRID)), key=lambda place: (abs(GRID[place] - wanted), place % 2))
        found.append(math.copysign(float(GRID[nearest] * scale), number))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_the_nearest_one_of_float8(dtype: torch.dtype) -> None:
    states = states_of(dtype)
    expected = [
        [value for layer in range(LAYERS) for value in slow(row[layer * HIDDEN :][:HIDDEN])]
        for row in states.tolist()
    ]
    assert torch.equal(there_and_back(states), torch.tensor(expected, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_moves_further_than_the_spacing_of_float8_allows(dtype: torch.dtype) -> None:
    """A sixteenth of itself, or a thousandth of the scale, which is at most twice as large as it must be."""
    states = states_of(dtype, seed=1)
    stored = narrowed("s", {"states": states}, [feature(dtype)])
    scales = stored["states" + SCALES].double()
    rows = states.double().view(-1, LAYERS, HIDDEN)
    moved = (widened(stored)["states"].double().view_as(rows) - rows).abs()
    assert bool((moved <= torch.maximum(rows.abs() / 16, scales[..., None] / 1024)).all())
    needed = rows.abs().amax(-1) / 448
    assert bool(((needed <= scales) & (scales < 2 * needed)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_came_back_once_comes_back_the_same(dtype: torch.dtype) -> None:
    once = there_and_back(states_of(dtype))
    assert torch.equal(there_and_back(once), once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_layer_is_rounded_as_if_it_were_alone(dtype: torch.dtype) -> None:
    """A capture for several methods has the layers apart; a large layer does not coarsen a small one."""
    states = states_of(dtype)
    states[:, :HIDDEN] *= 64
    alone = [there_and_back(part, layers=1) for part in states.split(HIDDEN, dim=-1)]
    assert torch.equal(there_and_back(states), torch.cat(alone, dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_the_smallest_numbers_of_the_dtype_come_back(dtype: torch.dtype) -> None:
    """Rounded up, the largest would be infinite; the smallest lose no more than a thousandth of the scale."""
    limits = torch.finfo(dtype)
    row = torch.tensor([limits.max, -limits.max, limits.max / 2, 1.0, 0.0, 0.0, 0.0, 0.0]).to(dtype)
    back = there_and_back(row[None], layers=1)[0]
    assert back.tolist()[:3] == [limits.max, -limits.max, back[2].item()]
    assert abs(back[2].item() - row[2].item()) <= row[2].item() / 16
    small = torch.tensor([[limits.tiny, -limits.tiny, 0.0, 0.0]]).to(dtype)
    assert torch.equal(there_and_back(small, layers=1), small)
    least = torch.full((1, 4), limits.smallest_normal, dtype=dtype) / 4
    moved = (there_and_back(least, layers=1).double() - least.double()).abs()
    assert bool((moved <= 2.0**-126 / 1024).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_sample(dtype: torch.dtype, value: float) -> None:
    states = states_of(dtype)
    states[7, HIDDEN + 2] = value
    with pytest.raises(EngineError, match=r"not finite, or all zero, for run:p7 \(states\)"):
        narrowed("run:p7", {"states": states}, [feature(dtype)])


def test_a_row_of_zeros_is_refused_with_its_sample() -> None:
    """Of one layer alone, too; no sound layer gives one."""
    states = states_of(torch.float32)
    states[7, HIDDEN : 2 * HIDDEN] = 0.0
    with pytest.raises(EngineError, match=r"all zero, for run:p7"):
        narrowed("run:p7", {"states": states}, [feature(torch.float32)])


def test_what_is_not_narrowed_stays_the_very_tensor() -> None:
    """Tokens, masks and states that are exact."""
    features = [
        Feature("tokens", Tokens(), dtype="int32"),
        Feature("mask", Targets(), dtype="uint8"),
        feature(torch.float32),
        Feature("last", States((8,)), Rows.PREDICTED, dtype="float32"),
    ]
    tensors = {
        "tokens": torch.arange(41, dtype=torch.int32),
        "mask": torch.ones(41, dtype=torch.uint8),
        "states": states_of(torch.float32),
        "last": torch.full((3, HIDDEN), math.nan),
    }
    stored = narrowed("s", tensors, features)
    assert stored.keys() == {*tensors, "states" + SCALES}
    assert stored["states"].dtype == torch.float8_e4m3fn
    back = widened(stored)
    assert back.keys() == tensors.keys()
    assert all(back[name] is tensors[name] for name in ("tokens", "mask", "last"))
    assert back["states"].dtype == torch.float32


def test_a_sample_without_rows_comes_back() -> None:
    empty = torch.empty(0, LAYERS * HIDDEN, dtype=torch.bfloat16)
    assert there_and_back(empty).shape == empty.shape


def test_only_states_can_be_narrowed() -> None:
    """Token ids stay exact."""
    with pytest.raises(ValueError, match="only states can be narrowed"):
        Feature("tokens", Tokens(), dtype="int32", narrowed=True)


@pytest.mark.parametrize(
    "scales",
    [
        None,
        torch.ones(39, LAYERS),
        torch.ones(40, 5),
        torch.ones(40, LAYERS, dtype=torch.int32),
        torch.ones(40),
    ],
)
def test_float8_without_scales_that_fit_is_damaged(scales: torch.Tensor | None) -> None:
    """The trainer never takes the bare numbers for states."""
    stored = narrowed("s", {"states": states_of(torch.float32)}, [feature(torch.float32)])
    del stored["states" + SCALES]
    given = stored if scales is None else {**stored, "states" + SCALES: scales}
    with pytest.raises(FeatureCorruptError, match=r"'states' is in float8 and has no scales that fit"):
        widened(given)
