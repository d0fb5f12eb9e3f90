"""Tensors as the bytes of a safetensors file and back. Never pickle.

A checkpoint is staged: its tensors are copied into memory that the checkpoint before used, laid out as the
file will be, and another thread writes them from there. That copy is all that training waits for; fresh
memory would cost it several times as much, in page faults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from paceline.durable_files import FileContent
from paceline.errors import CheckpointError

# In the order in which safetensors lays types out: from the end, so that every tensor is aligned.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
}
_RANK = {dtype: -place for place, dtype in enumerate(_DTYPES)}
_ALIGNMENT = 8


class Staging:
    """The files of one checkpoint at a time: those of the next one take the same memory."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def file(self, name: str, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        """The safetensors file of `tensors`; it changes when the file of that name is staged again.

        The bytes are those of `safetensors.torch.save`. Tensors may lie on any device.
        """
        ordered = sorted(tensors.items(), key=lambda item: (_RANK[item[1].dtype], item[0]))
        header, size = _header(ordered)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < len(header) + size:
            pinned = any(tensor.is_cuda for tensor in tensors.values())
            memory = torch.empty(len(header) + size, dtype=torch.uint8, pin_memory=pinned)
            self._memory[name] = memory
        memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        start = len(header)
        for _, tensor in ordered:
            end = start + tensor.nbytes
            memory[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            start = end
        return memory[:start].numpy().data


def _header(ordered: list[tuple[str, torch.Tensor]]) -> tuple[bytes, int]:
    """The length and the names, and how many bytes follow."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, end


def from_bytes(name: str, data: FileContent) -> dict[str, torch.Tensor]:
    """Raises CheckpointError if the bytes are no safetensors file."""
    try:
        return dict(load(bytes(data)))
    except SafetensorError as error:
        raise CheckpointError(
            f"{name} of a checkpoint cannot be read ({error}).",
            why="Its digest is right, so another program wrote it.",
            next="restore the checkpoint from a backup.",
        ) from error
