"""The parts that so many ranks would write of a checkpoint's file (training/sharding.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from paceline.parts import part_name
from paceline.training.tensor_files import FileBuffers


def in_parts(name: str, tensors: Mapping[str, torch.Tensor], ranks: int) -> dict[str, bytes]:
    """As FSDP2 divides: equal numbers of rows, fewer or none at the end. A scalar is in the first part."""
    files = {}
    for rank in range(ranks):
        pieces, begins = {}, {}
        for key, tensor in tensors.items():
            each = -(-len(tensor) // ranks) if tensor.ndim else 0
            piece = tensor[rank * each : (rank + 1) * each] if tensor.ndim else tensor
            if len(piece) if tensor.ndim else rank == 0:
                pieces[key], begins[key] = piece, rank * each
        part = part_name(name, rank, ranks)
        files[part] = bytes(FileBuffers().file(part, pieces, begins))
    return files
