"""Tensors as the bytes of a safetensors file and back. Never pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from paceline.errors import CheckpointError


def to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def from_bytes(name: str, data: bytes) -> dict[str, torch.Tensor]:
    """Raises CheckpointError if the bytes are no safetensors file."""
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise CheckpointError(
            f"{name} of a checkpoint cannot be read ({error}).",
            why="Its digest is right, so another program wrote it.",
            next="restore the checkpoint from a backup.",
        ) from error
