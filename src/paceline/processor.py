"""What this machine's processors can do. Standard library only."""

from __future__ import annotations

from pathlib import Path

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
CPUINFO = Path("/proc/cpuinfo")


def multiplies_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether they have instructions for products in bfloat16; False if the system does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    lines = (line.partition(":") for line in text.splitlines())
    return any(
        key.strip().lower() in ("flags", "features") and BFLOAT16_FLAGS & set(value.split())
        for key, _, value in lines
    )
