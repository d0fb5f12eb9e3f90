"""Which floating-point type a role computes in: bfloat16 where the processor has it, float32 elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def torch_dtype(name: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> torch.dtype:
    """The type that "auto", "bfloat16" or "float32" stands for on this machine."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(cpuinfo) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bfloat16 products are done in hardware: a CUDA device that has them, or the processor."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    lines = (line.partition(":") for line in text.splitlines())
    return any(
        key.strip().lower() in ("flags", "features") and BFLOAT16_FLAGS & set(value.split())
        for key, _, value in lines
    )
