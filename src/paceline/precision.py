"""The device and the floating-point type of a role: the one place that resolves "auto"."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from paceline.errors import ConfigError
from paceline.processor import CPUINFO, multiplies_bfloat16

CPU = torch.device("cpu")


def resolve_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda:N" stands for on this machine: "auto" is the first CUDA one.

    Raises ConfigError for a device that does not exist.
    """
    count = _cuda_count()
    if name == "auto":
        return torch.device("cuda:0") if count else CPU
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"There is no device {name}: this machine has {count} CUDA devices.",
            why="A role computes on the device that the run file names, and on no other.",
            next="set device to auto, to cpu, or to an existing device.",
        )
    return device


def cuda_devices() -> list[str]:
    """The names of the CUDA devices that this process can use."""
    return [torch.cuda.get_device_name(number) for number in range(_cuda_count())]


def _cuda_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def torch_dtype(name: str, device: torch.device, cpuinfo: Path = CPUINFO) -> torch.dtype:
    """The type that "auto", "bfloat16" or "float32" stands for on `device`.

    "auto" is bfloat16 if the hardware multiplies it, otherwise float32.
    """
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device, cpuinfo) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def has_bfloat16(device: torch.device, cpuinfo: Path = CPUINFO) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return multiplies_bfloat16(cpuinfo)


def is_autocasting(device: torch.device) -> bool:
    """Whether torch chooses the type of products on this device now."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, types are as they are given; torch refuses to say so of a device that has no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
