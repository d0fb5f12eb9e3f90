"""The learning rate of every step, and an optimizer that is written down and read back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.training.muon import RMS, orthogonal, update_of
from paceline.training.optimizer import (
    build_optimizer,
    learning_rate_at,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from paceline.training.settings import OptimizerSection, TrainerSettings, TrainingSection


def schedule(total_steps: int | None, *totals_before: int, **knobs: Any) -> TrainerSettings:
    section = TrainingSection(**knobs)
    return TrainerSettings(total_steps, first_samples=1, training=section, totals_before=totals_before)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, 0.25),  # warm-up: a quarter more each step
        (3, 0.75),
        (4, 1.0),  # the peak, at the warm-up's end
        (5, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 8))),
        (8, 0.6),  # half of the cosine
        (12, 0.2),  # its end
        (13, 0.2),  # and beyond
        (1_000_000, 0.2),
    ],
)
def test_the_rate_warms_up_follows_a_cosine_and_stays_at_its_end(step: int, rate: float) -> None:
    """Rates of a schedule of 12 steps with 4 of warm-up, from 1.0 down to 0.2."""
    settings = schedule(12, learning_rate=1.0, final_learning_rate=0.2, warmup_steps=4)
    assert learning_rate_at(step, settings) == pytest.approx(rate, rel=1e-12)


def test_a_stream_without_an_end_keeps_its_rate() -> None:
    """Without `total_steps` the rate warms up and is constant from there on."""
    settings = schedule(None, learning_rate=0.5, warmup_steps=2)
    assert [learning_rate_at(step, settings) for step in (1, 2, 3, 10**9)] == [0.25, 0.5, 0.5, 0.5]


def test_a_run_that_is_extended_keeps_the_rates_of_the_steps_it_had() -> None:
    """A replay of them gives the same weights; later steps are of the longer schedule."""
    short, long = (schedule(total, warmup_steps=2) for total in (10, 30))
    extended = schedule(30, 10, warmup_steps=2)
    assert [learning_rate_at(step, extended) for step in range(1, 31)] == [
        learning_rate_at(step, short if step <= 10 else long) for step in range(1, 31)
    ]


def test_a_schedule_without_warm_up_begins_at_its_peak() -> None:
    """No division by zero, and a schedule of which the warm-up is all falls to its end at once."""
    none = schedule(10, learning_rate=1.0, final_learning_rate=0.0, warmup_steps=0)
    assert learning_rate_at(5, none) == pytest.approx(0.5)
    warm_up_only = schedule(4, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4)
    assert [learning_rate_at(step, warm_up_only) for step in (4, 5)] == [1.0, pytest.approx(0.1)]


def test_matrices_decay_and_named_parameters_have_their_own_rate() -> None:
    """Decay leaves vectors alone; a factor goes to the parameter of its name and to no other."""
    draft = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    settings = TrainingSection(weight_decay=0.1)
    optimizer = build_optimizer(draft, settings, {"0.weight": 0.5})
    set_learning_rate(optimizer, 0.2)
    got = {
        name: (group["lr"], group["weight_decay"])
        for (name, _), group in zip(draft.named_parameters(), optimizer.param_groups, strict=True)
    }
    assert got == {
        "0.weight": (0.1, 0.1),
        "0.bias": (0.2, 0.0),
        "1.weight": (0.2, 0.0),
        "1.bias": (0.2, 0.0),
    }


def _train(draft: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        draft(torch.randn(5, 8, generator=generator)).square().sum().backward()
        set_learning_rate(optimizer, 0.01 * step)
        optimizer.step()


def _draft() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


ADAMWS, MUONS = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", {"name": "muon", "block_rows": 3}])
def test_a_restored_optimizer_takes_the_next_steps_bit_for_bit(optimizer: Any) -> None:
    """Moments and the count of steps come back: three steps, a restart and three steps make six."""
    settings = TrainingSection(weight_decay=0.01, optimizer=OptimizerSection.parse(optimizer))
    whole = _draft()
    _train(whole, build_optimizer(whole, settings), range(1, 7))

    first = _draft()
    before = build_optimizer(first, settings)
    _train(first, before, range(1, 4))
    written = {key: tensor.clone() for key, tensor in optimizer_tensors(first, before).items()}
    second = _draft()
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(second, settings)
    restore_optimizer(second, restored, written)
    _train(second, restored, range(4, 7))

    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key
    assert set(written) == {
        f"{parameter}.{key}"
        for parameter, weight in whole.named_parameters()
        for key in (MUONS if optimizer != "adamw" and weight.dim() == 2 else ADAMWS)
    }


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw() -> None:
    """Vectors and named matrices move as AdamW moves them; a matrix moves by an orthogonal one, whose
    elements have the size that arXiv 2502.16982 gives them, times rate and factor."""
    settings = TrainingSection(
        optimizer=OptimizerSection.parse({"name": "muon", "adamw_for": ["2."]}), weight_decay=0.1
    )
    turned, plain = _draft(), _draft()
    before = {name: weight.detach().clone() for name, weight in turned.named_parameters()}
    scales = {"0.weight": 0.5}
    _train(turned, build_optimizer(turned, settings, scales), range(1, 2))
    _train(plain, build_optimizer(plain, TrainingSection(weight_decay=0.1), scales), range(1, 2))
    of_adamw = dict(plain.named_parameters())
    same = {name for name, weight in turned.named_parameters() if torch.equal(weight, of_adamw[name])}
    assert same == set(before) - {"0.weight"}
    rate = 0.01 * 0.5
    moved = turned.get_parameter("0.weight").detach() - before["0.weight"] * (1 - rate * 0.1)
    singular = torch.linalg.svdvals(moved) / (rate * 0.2 * 8**0.5)
    # Five samples give a gradient of rank 5.
    assert float(singular[4]) > 0.5
    assert float(singular[0]) < 1.5


def test_a_block_of_the_whole_matrix_is_muon() -> None:
    """Of PyTorch, with decay, momentum and a factor, wide and tall; its products may sum in another order."""
    section = {"name": "muon", "momentum": 0.8, "adamw_for": []}
    drafts = []
    for block in ({}, {"block_rows": 64}):
        optimizer = OptimizerSection.parse({**section, **block})
        settings = TrainingSection(optimizer=optimizer, weight_decay=0.1)
        torch.manual_seed(0)
        drafts.append(nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 40), nn.LayerNorm(40)))
        built = build_optimizer(drafts[-1], settings, {"0.weight": 0.5})
        for _ in range(3):
            set_learning_rate(built, 0.01)
            for weight in drafts[-1].parameters():
                weight.grad = torch.randn(weight.shape)
            built.step()
    whole, blocks = drafts
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(blocks.get_parameter(name), weight, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(11, 40, 4), (40, 11, 4), (10, 40, 5), (6, 40, 3), (4, 40, 4), (5, 5, 5)]
)
def test_each_block_of_an_update_is_orthogonal_by_itself(rows: int, columns: int, size: int) -> None:
    """At most five rows of the shorter side to a block, in blocks of equal size, but for the last. The
    elements have AdamW's size."""
    momentum = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    update = update_of(momentum, block_rows=5).float()
    assert update.shape == momentum.shape
    wide, given = (update.mT, momentum.mT) if rows > columns else (update, momentum)
    for first in range(0, len(wide), size):
        block = wide[first : first + size] / (RMS * wide.shape[1] ** 0.5)
        singular = torch.linalg.svdvals(block)
        assert 0.5 < float(singular[-1]) <= float(singular[0]) < 1.5
        # The same directions, as if the other blocks were not there.
        alone = orthogonal(given[None, first : first + size].bfloat16())[0].float()
        torch.testing.assert_close(block, alone, rtol=0.0, atol=0.02)


def test_a_block_without_gradient_stays() -> None:
    """A layer that another one of zeros follows has none in the first step."""
    momentum = torch.zeros(6, 8)
    momentum[:3] = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    update = update_of(momentum, block_rows=3)
    assert torch.isfinite(update).all()
    assert not update[3:].any()


def test_what_the_method_keeps_from_muon_moves_by_adamw() -> None:
    """Beside what the run file keeps."""
    muon = TrainingSection(optimizer=OptimizerSection.parse({"name": "muon", "adamw_for": ["2."]}))
    kept, plain = _draft(), _draft()
    _train(kept, build_optimizer(kept, muon, adamw_for=("0.",)), range(1, 3))
    _train(plain, build_optimizer(plain, TrainingSection()), range(1, 3))
    for name, weight in plain.named_parameters():
        assert torch.equal(kept.get_parameter(name), weight), name


def test_an_optimizer_has_only_its_own_knobs() -> None:
    """`optimizer: muon` is a mapping with that name, and a knob that would be ignored is refused."""
    assert TrainingSection.parse({"optimizer": "muon"}).optimizer.name == "muon"
    with pytest.raises(ConfigError, match="momentum belongs to muon"):
        TrainingSection.parse({"optimizer": {"name": "adamw", "momentum": 0.9}})
    with pytest.raises(ConfigError, match=r"optimizer\.momentun"):
        TrainingSection.parse({"optimizer": {"name": "muon", "momentun": 0.9}})


def test_restoring_takes_copies() -> None:
    """What was read from a checkpoint is not changed by the steps that follow."""
    settings = TrainingSection()
    draft = _draft()
    optimizer = build_optimizer(draft, settings)
    _train(draft, optimizer, range(1, 3))
    written = {name: tensor.clone() for name, tensor in optimizer_tensors(draft, optimizer).items()}
    before = {name: tensor.clone() for name, tensor in written.items()}
    again = build_optimizer(draft, settings)
    restore_optimizer(draft, again, written)
    _train(draft, again, range(3, 5))
    assert all(torch.equal(before[name], written[name]) for name in before)
