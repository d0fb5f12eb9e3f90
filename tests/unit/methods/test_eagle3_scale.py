"""What the loss of long samples and large batches may cost: no quadratic buffer, no wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.methods.eagle3 import attention
from paceline.methods.eagle3.batch import Unrolling, collate
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.testing.synthetic import HIDDEN, VOCAB, synthetic_head

STEPS, DRAFT_VOCAB, HEADS = 3, 24, 4


def _sample(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(length, 4 * HIDDEN, generator=generator)
    return {
        "input_ids": torch.randint(3, VOCAB, (length + 1,), generator=generator).int(),
        "loss_mask": (torch.arange(length + 1) >= 3).to(torch.uint8),
        "aux_hidden_states": states[:, : 3 * HIDDEN].contiguous(),
        "last_hidden_states": states[2:, 3 * HIDDEN :].contiguous(),
    }


@pytest.fixture
def draft() -> Eagle3Draft:
    method = Eagle3Method({"draft_vocab_size": DRAFT_VOCAB, "ttt_steps": STEPS, "init": "random"})
    return method.build(synthetic_head(), [_sample(30)], seed=1)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


def test_a_sample_of_2000_tokens_trains_in_bounded_memory(
    draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward make nothing of the size heads x anchors x rows, and tiles change no gradient."""
    tokens = 2000
    batch = collate([_sample(tokens)], Unrolling(STEPS, 0.8))
    parameters = list(draft.parameters())
    with _Largest() as largest:
        tiled = torch.autograd.grad(draft(batch).loss_sum, parameters)
    assert largest.numel <= HEADS * attention.TILE_ANCHORS * tokens
    monkeypatch.setattr(attention, "TILE_ANCHORS", tokens)
    whole = torch.autograd.grad(draft(collate([_sample(tokens)], Unrolling(STEPS, 0.8))).loss_sum, parameters)
    for left, right in zip(tiled, whole, strict=True):
        assert bool(torch.isfinite(left).all())
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


def test_logits_of_a_large_batch_are_kept_for_no_group(draft: Eagle3Draft) -> None:
    """In groups of anchors the loss, its parts and its gradients are those of one group, and no tensor
    holds the logits of more than a group's rows."""
    samples = [_sample(length, length) for length in (120, 3, 200, 90)]
    parameters, found = list(draft.parameters()), []
    for group_anchors in (1 << 30, 32):
        batch = collate(samples, Unrolling(STEPS, 0.8, group_anchors))
        kept: list[int] = []

        def count(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            if tensor.shape[-1] == DRAFT_VOCAB:
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            sums = draft(batch)
        found.append([sums.loss_sum.detach(), *torch.autograd.grad(sums.loss_sum, parameters)])
        found[-1] += [value.double() for value in sums.metrics.values()]
        assert len(batch.groups) == (1 if group_anchors > 32 else -(-batch.num_tokens // 32))
        assert bool(kept) == (group_anchors > 32), "several groups keep no logits between the passes"
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("group_anchors", [1 << 30, 16])
def test_no_operation_of_a_step_waits_for_the_device(
    draft: Eagle3Draft, recompute: bool, group_anchors: int
) -> None:
    """Meta tensors have no values: whatever would read one (a boolean index, an item) is an error there."""
    draft.recompute = recompute
    batch = collate([_sample(40), _sample(17, 1)], Unrolling(STEPS, 0.8, group_anchors))
    meta = torch.device("meta")
    sums = draft.to(meta)(batch.to(meta))
    sums.loss_sum.backward()
    assert sums.num_tokens == batch.num_tokens
    assert all(parameter.grad is not None for parameter in draft.parameters())
