"""Tensors to the bytes of a safetensors file and back. Never pickle.

Training waits only while the tensors are copied, in the file's layout, into memory that the checkpoint
before used; another thread writes the file from there. Fresh memory would take several times as long, in
page faults.
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
from paceline.parts import METADATA, first_rows, joined, parts_of, sharding_info

# safetensors lays types out in the reverse of this order, so that every tensor is aligned.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
}
_RANK = {dtype: -place for place, dtype in enumerate(_DTYPES)}
_ALIGNMENT = 8


class FileBuffers:
    """Holds the files of one checkpoint at a time; those of the next one take the same memory."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def file(
        self, name: str, tensors: Mapping[str, torch.Tensor], begins: Mapping[str, int] | None = None
    ) -> memoryview:
        """The safetensors file of `tensors`, valid until the next call with this name.

        The bytes are those of `safetensors.torch.save`. Tensors may lie on any device. `begins`: they are a
        part (parts.py), and each begins at that row of the whole tensor.
        """
        ordered = sorted(tensors.items(), key=lambda item: (_RANK[item[1].dtype], item[0]))
        shapes = {key: tensor.shape for key, tensor in ordered}
        header, size = _header(ordered, None if begins is None else sharding_info(shapes, begins))
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


def _header(ordered: list[tuple[str, torch.Tensor]], metadata: Mapping[str, str] | None) -> tuple[bytes, int]:
    """The file's header, and how many bytes follow it."""
    entries: dict[str, Any] = {} if metadata is None else {METADATA: metadata}
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


def read(name: str, files: Mapping[str, FileContent]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's file, which may lie in parts. Raises KeyError, CheckpointError."""
    names = parts_of(name, files)
    if names == [name]:
        return from_bytes(name, files[name])
    return joined([read_part(part, files[part]) for part in names])


def read_part(name: str, data: FileContent) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """A part's tensors, and the row of the whole at which each begins; of a whole file no row.

    Raises CheckpointError.
    """
    return from_bytes(name, data), first_rows(data)


def from_bytes(name: str, data: FileContent) -> dict[str, torch.Tensor]:
    """Raises CheckpointError if the bytes are not a safetensors file."""
    try:
        return dict(load(bytes(data)))
    except SafetensorError as error:
        raise CheckpointError(
            f"{name} of a checkpoint cannot be read ({error}).",
            why="Its digest is right, so another program wrote it.",
            next="restore the checkpoint from a backup.",
        ) from error
