"""Weights divided by rows, on one rank: what is gathered is released, and no gradient outlives its step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from paceline.engines.engine import CaptureRequest
from paceline.errors import CheckpointError, RanksError
from paceline.roles.trainers import MeetingPoint
from paceline.testing.small_run import SmallRun
from paceline.testing.synthetic import synthetic_head
from paceline.training.group import Group
from paceline.training.link import Place
from paceline.training.sharding import Sharding
from paceline.training.torch_learner import TorchLearner


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


@pytest.mark.parametrize("name", ["torch.Tensor.div_", "torch.nn.utils.clip_grad_norm_"])
def test_what_a_rank_alone_runs_into_at_the_norm_of_the_gradients_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The others sum the norm meanwhile, and would take its answer for a part of that."""
    run = SmallRun(tmp_path)
    run.sharded = True
    features = run.method.features(run.engine.facts)
    requests = [CaptureRequest(f"s{n}", run.engine.encode(f"prompt {n}"), max_new_tokens=6) for n in range(4)]
    samples = [one.tensors for one in run.engine.capture(requests, features)]
    meeting = MeetingPoint(1)
    port, listens = int(meeting.environment(0)["MASTER_PORT"]), os.dup(meeting.descriptors(0)[0])
    meeting.close()
    place = Place(0, 1, "127.0.0.1", port, listens=listens)  # torch closes it
    group = Group(place, timeout_s=60.0, device=torch.device("cpu"))
    try:
        learner = TorchLearner(run.method, synthetic_head(), run.settings, group)
        learner.build(samples)
        learner.load(learner.files())
        assert learner.step(1, samples, learner.num_tokens(samples))["grad_norm"] > 0

        def fail(*_: object) -> None:
            raise MemoryError("out of memory")

        monkeypatch.setattr(name, fail)
        with pytest.raises(RanksError, match="rank 0 exchanged weights or gradients, and out of memory"):
            learner.step(2, samples, learner.num_tokens(samples))
    finally:
        group.leave()


def test_an_optimizer_of_which_rows_are_missing_is_refused(draft: nn.Module, sharding: Sharding) -> None:
    optimizer = torch.optim.AdamW(draft.parameters())
    name = next(name for name, _ in draft.named_parameters())
    part = {f"{name}.exp_avg": torch.ones(3, 3), f"{name}.step": torch.tensor(2.0)}
    with pytest.raises(CheckpointError, match=r"exp_avg of a checkpoint has 3 of rank 0's 4 rows"):
        sharding.restore_optimizer(optimizer, [(part, {f"{name}.exp_avg": 1})])
