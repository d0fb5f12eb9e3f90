"""Memory of samples that were read is used again, but never while a tensor lies in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from paceline.features import landing
from paceline.features.landing import ALIGNMENT_BYTES, RECYCLED_BYTES_MIN, Landing

SIZE = RECYCLED_BYTES_MIN + 1000


def tensor_in(memory: Landing, num_bytes: int = SIZE) -> torch.Tensor:
    return torch.frombuffer(memory.take(num_bytes), dtype=torch.uint8)


def test_memory_is_used_again_when_its_tensor_is_gone() -> None:
    """Also for a sample of slightly another length; the pages are the same."""
    memory = Landing()
    tensor = tensor_in(memory)
    address = tensor.data_ptr()
    assert memory.idle_bytes == 0
    del tensor
    assert memory.idle_bytes >= SIZE
    again = tensor_in(memory, SIZE - 500)
    assert again.data_ptr() == address
    assert again.numel() == SIZE - 500
    assert memory.idle_bytes == 0


WAYS_TO_HOLD: dict[str, Callable[[torch.Tensor], Any]] = {
    "slice": lambda tensor: tensor[5:6],
    "view": lambda tensor: tensor.view(-1, 8)[3],
    "numpy": lambda tensor: tensor.numpy(),
    "detached": lambda tensor: tensor.view(torch.float32).detach(),
    "parameter": lambda tensor: torch.nn.Parameter(tensor.view(torch.float32)[:3]).data,
}


@pytest.mark.parametrize("way", WAYS_TO_HOLD)
def test_memory_is_not_used_again_while_anything_lies_in_it(way: str) -> None:
    """Whatever way of holding on to the bytes is left."""
    memory = Landing()
    held = WAYS_TO_HOLD[way](tensor_in(memory).fill_(7))
    before = held + 0
    others = [tensor_in(memory).fill_(number) for number in range(3)]
    assert (held == before).all()
    assert len({other.data_ptr() for other in others}) == 3
    assert memory.idle_bytes == 0
    del held
    assert memory.idle_bytes >= SIZE


def test_small_samples_are_left_to_malloc() -> None:
    """They get memory of their own, aligned as a tensor's."""
    memory = Landing()
    for num_bytes in (0, 1, 100, RECYCLED_BYTES_MIN - 1):
        assert len(memory.take(num_bytes)) == num_bytes
    for num_bytes in (1, 100, SIZE, 3 * SIZE):
        assert tensor_in(memory, num_bytes).data_ptr() % ALIGNMENT_BYTES == 0


def test_idle_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that were idle longest go first, whatever their size."""
    monkeypatch.setattr(landing, "IDLE_BYTES_MAX", 4 * SIZE)
    memory = Landing()
    tensors = [tensor_in(memory, (1 + number % 2) * SIZE) for number in range(8)]
    last = tensors[-1].data_ptr()
    while tensors:
        del tensors[0]
    assert SIZE < memory.idle_bytes <= 4 * SIZE
    assert tensor_in(memory, 2 * SIZE).data_ptr() == last


def test_threads_never_share_memory() -> None:
    """Each fills what it took and finds it unchanged, while the others take and drop."""
    memory, wrong = Landing(), []
    tensor_in(memory)
    block_bytes = memory.idle_bytes  # More than SIZE: sizes are rounded up.

    def work(number: int) -> None:
        for _ in range(100):
            tensor = tensor_in(memory)
            tensor[:64].fill_(number)
            tensor[-64:].fill_(number)
            if not (tensor[:64] == number).all() or not (tensor[-64:] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert memory.idle_bytes <= 8 * block_bytes  # Each thread takes one before it drops the last.
