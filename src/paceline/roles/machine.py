"""What this machine has: processors, memory, GPUs. It loads no torch and starts nothing but nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from paceline.processor import multiplies_bfloat16
from paceline.visible_devices import DEVICES_VARIABLE, names_left

MEMORY = Path("/proc/meminfo")
DEVICES = (Path("/dev/nvidia0"), Path("/dev/kfd"))
ASKED = ("name", "memory.total", "compute_cap", "driver_version")
PATIENCE_S = 10.0  # of a driver that hangs


@dataclass(frozen=True)
class Gpu:
    """`capability`: CUDA's compute capability, 0 if unknown."""

    name: str
    memory_bytes: int
    capability: float = 0.0
    driver: str = ""


@dataclass(frozen=True)
class Machine:
    """`memory_bytes`: of the host; 0 if unknown. `bfloat16`: whether the processors multiply it.

    `has_unknown_gpus`: there are some, and no nvidia-smi that tells of them.
    """

    processors: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    bfloat16: bool
    has_unknown_gpus: bool = False

    def device(self, name: str) -> str:
        """What "auto" stands for here (precision.py decides at the start)."""
        return ("cuda:0" if self.gpus or self.has_unknown_gpus else "cpu") if name == "auto" else name

    def dtype(self, name: str, device: str) -> str:
        """What "auto" stands for on a device of this machine."""
        if name != "auto":
            return name
        if device == "cpu":
            return "bfloat16" if self.bfloat16 else "float32"
        number = int(device.partition(":")[2] or 0)
        old = number < len(self.gpus) and 0 < self.gpus[number].capability < 8
        return "float32" if old else "bfloat16"


def this_machine() -> Machine:
    gpus = gpus_of_the_driver()
    return Machine(
        processors=len(os.sched_getaffinity(0)),
        memory_bytes=_memory(),
        gpus=_visible(gpus),
        bfloat16=multiplies_bfloat16(),
        has_unknown_gpus=not gpus and any(path.exists() for path in DEVICES),
    )


def gpus_of_the_driver() -> tuple[Gpu, ...]:
    """As nvidia-smi tells; none without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(gpu for gpu in map(_gpu, told.stdout.splitlines()) if gpu) if told.returncode == 0 else ()


def _gpu(line: str) -> Gpu | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(ASKED):
        return None
    name, memory, capability, driver = parts
    try:
        return Gpu(name, int(memory) << 20, _number(capability), driver)
    except ValueError:
        return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _visible(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves to a process, in its order."""
    named = os.environ.get(DEVICES_VARIABLE)
    if named is None:
        return gpus
    numbers = names_left(named)
    if all(number.isdecimal() for number in numbers):
        return tuple(gpus[int(number)] for number in numbers if int(number) < len(gpus))
    return gpus[: len(numbers)]  # named by UUID


def _memory() -> int:
    try:
        for line in MEMORY.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemTotal":
                return int(value.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 0
