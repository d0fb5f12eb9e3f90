"""The bytes of a checkpoint's tensors: staged in memory that is used again, and read back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from paceline.errors import CheckpointError
from paceline.training.tensor_files import FileBuffers, from_bytes


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Every type that a checkpoint holds, sizes that are no multiple of anything, and a scalar."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "t2d": torch.rand(13, generator=draw) > 0.5,
        "torch": torch.randint(0, 256, (7,), dtype=torch.uint8, generator=draw),
        "d2t": torch.randint(0, 99, (5,), generator=draw),
        "norm.weight": torch.randn(3, generator=draw),
        "fc.weight": torch.randn(3, 5, generator=draw),
        "half": torch.randn(3, generator=draw).bfloat16(),
        "step": torch.tensor(2.0),
        "nothing": torch.empty(0, 4),
        "transposed": torch.randn(4, 3, generator=draw).T,
        'a "name" \u00e9': torch.zeros(1),
    }


def test_a_staged_file_has_the_bytes_that_safetensors_writes() -> None:
    """So whatever reads safetensors reads a checkpoint."""
    given = tensors(0)
    expected = save({name: tensor.contiguous() for name, tensor in given.items()})
    assert bytes(FileBuffers().file("draft", given)) == expected


def test_the_next_checkpoint_takes_the_memory_of_the_one_before() -> None:
    """Fresh memory would be paid for in page faults, at every checkpoint."""
    staging = FileBuffers()
    first = staging.file("draft", tensors(0))
    other = staging.file("optimizer", tensors(1))
    second = staging.file("draft", tensors(2))
    assert torch.frombuffer(first, dtype=torch.uint8).data_ptr() == (
        torch.frombuffer(second, dtype=torch.uint8).data_ptr()
    )
    for name, tensor in tensors(1).items():
        assert torch.equal(load(bytes(other))[name], tensor), "another file's memory is its own"
    larger = {**tensors(2), "more": torch.ones(10_000)}
    assert torch.equal(from_bytes("draft", staging.file("draft", larger))["more"], torch.ones(10_000))


def test_bytes_that_are_no_safetensors_file_are_refused_with_advice() -> None:
    """Another program wrote them."""
    with pytest.raises(CheckpointError, match="optimizer"):
        from_bytes("optimizer", b"\x08\0\0\0\0\0\0\0notjson!")
