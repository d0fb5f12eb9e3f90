"""One optimizer step against the loop that one would write by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from paceline.errors import TrainingError
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import captured_sample, save_target, tiny_target
from paceline.training.optimizer import build_optimizer, learning_rate_at
from paceline.training.settings import TrainerSettings, TrainingSection
from paceline.training.step import accumulate_gradients, train_step

CPU = torch.device("cpu")


def settings_of(micro_batch_size: int, grad_clip: float = 0.5) -> TrainerSettings:
    section = TrainingSection(
        learning_rate=1e-2, warmup_steps=4, grad_clip=grad_clip, micro_batch_size=micro_batch_size
    )
    return TrainerSettings(total_steps=20, first_samples=1, training=section)


SETTINGS = settings_of(micro_batch_size=2)


@pytest.fixture(scope="module")
def method() -> Eagle3Method:
    return Eagle3Method({"draft_vocab_size": 24, "ttt_steps": 2, "init": "random"})


@pytest.fixture(scope="module")
def samples() -> list[dict[str, torch.Tensor]]:
    model = tiny_target()
    return [captured_sample(model, length, 3, length) for length in (9, 14, 6, 11, 30)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> TargetHead:
    return TargetHead.load(save_target(tiny_target(), Path(tmp_path_factory.mktemp("target"))))


@pytest.fixture
def draft(method: Eagle3Method, head: TargetHead, samples: list[dict[str, torch.Tensor]]) -> Eagle3Draft:
    return method.build(head, samples, seed=3)


def _plain(draft: Eagle3Draft, method: Eagle3Method, samples: list[dict[str, torch.Tensor]]) -> int:
    """Sample by sample, gradients of the summed loss left in the draft; the tokens."""
    draft.zero_grad()
    tokens = 0
    for sample in samples:
        sums = draft(method.collate([sample], CPU))
        sums.loss_sum.backward()
        tokens += sums.num_tokens
    return tokens


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
@pytest.mark.parametrize("num_tokens", [None, 7.5])
def test_gradients_are_divided_once_by_all_tokens(
    draft: Eagle3Draft,
    method: Eagle3Method,
    samples: list[dict[str, torch.Tensor]],
    micro_batch_size: int,
    num_tokens: float | None,
) -> None:
    """However the samples are cut, and by the count that is handed in if one is."""
    tokens = _plain(draft, method, samples)
    wanted = {n: p.grad / (num_tokens or tokens) for n, p in draft.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in wanted.values()))
    sums = accumulate_gradients(
        samples,
        draft,
        method,
        settings_of(micro_batch_size, grad_clip=1e9),
        what="a test",
        num_tokens=num_tokens,
    )
    assert sums.num_tokens == tokens
    assert sums.grad_norm == pytest.approx(norm, rel=1e-4)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_step_is_clip_rate_and_adamw(
    draft: Eagle3Draft, method: Eagle3Method, head: TargetHead, samples: list[dict[str, torch.Tensor]]
) -> None:
    """Two steps move the weights exactly as PyTorch's own optimizer does with clipped mean gradients."""
    other = method.restore(head, draft.state_dict())
    plain = torch.optim.AdamW(other.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = build_optimizer(draft, SETTINGS.training)
    for step in (1, 2):
        result = train_step(step, samples, draft, method, optimizer, SETTINGS)
        tokens = _plain(other, method, samples)
        loss = float(other(method.collate(samples, CPU)).loss_sum.detach()) / tokens
        for parameter in other.parameters():
            parameter.grad /= tokens
        norm = float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5))
        for group in plain.param_groups:
            group["lr"] = learning_rate_at(step, SETTINGS)
        plain.step()
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert result["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert norm > 0.5, "the gradients of this case are meant to be clipped"
        assert (result["num_tokens"], result["learning_rate"]) == (tokens, 2.5e-3 * step)
        assert result["acceptance_length_estimate"] >= 1.0
    for (name, ours), theirs in zip(draft.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_without_a_token_to_learn_moves_nothing(
    draft: Eagle3Draft, method: Eagle3Method, samples: list[dict[str, torch.Tensor]]
) -> None:
    """Not even by the momentum of the steps before."""
    optimizer = build_optimizer(draft, SETTINGS.training)
    train_step(1, samples, draft, method, optimizer, SETTINGS)
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    empty = [captured_sample(tiny_target(), 1, 1, 0)]
    result = train_step(2, empty, draft, method, optimizer, SETTINGS)
    assert (result["num_tokens"], result["loss"], result["grad_norm"]) == (0, 0.0, 0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in draft.state_dict().items())


def test_a_loss_that_is_not_finite_leaves_the_weights(
    draft: Eagle3Draft, method: Eagle3Method, samples: list[dict[str, torch.Tensor]]
) -> None:
    """The step is named, and nothing was updated."""
    optimizer = build_optimizer(draft, SETTINGS.training)
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    nan = {**samples[0], "aux_hidden_states": torch.full_like(samples[0]["aux_hidden_states"], torch.nan)}
    with pytest.raises(TrainingError, match="Step 5"):
        train_step(5, [samples[1], nan], draft, method, optimizer, settings_of(micro_batch_size=1))
    assert all(torch.equal(before[name], tensor) for name, tensor in draft.state_dict().items())
