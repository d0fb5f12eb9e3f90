"""Weights divided by rows, on one rank: what is gathered is released, and no gradient outlives its step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from paceline.errors import CheckpointError, RanksError
from paceline.training.sharding import Sharding


@pytest.fixture
def draft() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.fixture
def sharding(tmp_path: Path, draft: nn.Module) -> Iterator[Sharding]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        yield Sharding(draft, rank=0, ranks=1)
    finally:
        distributed.destroy_process_group()


def test_sharded_ranks_wait_for_each_other_as_long_as_all_others(
    tmp_path: Path, draft: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a GPU that the draft does not use, torch would make a group that waits for half an hour."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        assert Sharding(draft, rank=0, ranks=1)._mesh.get_group() is distributed.group.WORLD
    finally:
        distributed.destroy_process_group()


def test_whole_weights_are_there_between_gather_and_release_alone(
    draft: nn.Module, sharding: Sharding
) -> None:
    assert all(isinstance(weight, DTensor) for weight in draft.parameters())
    sharding.gather()
    assert not any(isinstance(weight, DTensor) for weight in draft.parameters())
    sharding.release()
    sharding.release()
    assert all(isinstance(weight, DTensor) for weight in draft.parameters())


def test_a_pass_that_fails_leaves_no_gradient_for_the_next_step(draft: nn.Module, sharding: Sharding) -> None:
    """As after a bad sample among several micro-batches."""
    sharding.gather()
    draft(torch.ones(3)).sum().backward()
    sharding.release()
    sharding.gather()
    assert [weight.grad for weight in draft.parameters()] == [None] * 4


def test_a_parameter_that_a_step_does_not_reach_has_no_gradient_of_the_step_before(
    draft: nn.Module, sharding: Sharding
) -> None:
    """AdamW would move it by that."""
    for reached in (4, 2):
        sharding.gather()
        draft(torch.ones(3)).sum().backward()
        sharding.reduce(list(draft.parameters())[:reached])
        assert [weight.grad is not None for weight in draft.parameters()] == [n < reached for n in range(4)]


def test_what_a_rank_alone_runs_into_in_an_exchange_ends_it(
    draft: nn.Module, sharding: Sharding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are in the exchange and would take its next message for weights."""

    def fail(*_: object) -> None:
        raise MemoryError("out of memory")

    sharding.gather()
    monkeypatch.setattr(torch, "zeros_like", fail)
    with pytest.raises(RanksError, match="rank 0 exchanged weights or gradients, and out of memory"):
        sharding.reduce(list(draft.parameters()))
    monkeypatch.setattr(sharding._root, "unshard", fail)
    with pytest.raises(RanksError, match="out of memory"):
        sharding.gather()


def test_an_optimizer_of_which_rows_are_missing_is_refused(draft: nn.Module, sharding: Sharding) -> None:
    optimizer = torch.optim.AdamW(draft.parameters())
    name = next(name for name, _ in draft.named_parameters())
    part = {f"{name}.exp_avg": torch.ones(3, 3), f"{name}.step": torch.tensor(2.0)}
    with pytest.raises(CheckpointError, match=r"exp_avg of a checkpoint has 3 of rank 0's 4 rows"):
        sharding.restore_optimizer(optimizer, [(part, {f"{name}.exp_avg": 1})])
