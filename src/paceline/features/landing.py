"""The memory that a reader's samples are copied into, used again once no tensor lies in it.

Fresh pages cost as much as the copy: the kernel zeroes each before it is written. A block counts as
used until the last tensor in it, and the last view of one, is gone, which is just when an allocator
would have got it back; so nothing changes for whoever holds a tensor, or forgets one. Any thread may
take, and any may drop the last tensor.
"""

from __future__ import annotations

import weakref

import numpy as np

ALIGNMENT_BYTES = 64  # Of a tensor of torch's own: kernels may round differently elsewhere.
RECYCLED_BYTES_MIN = 256 << 10  # Smaller pieces malloc keeps; larger ones it may give back at once.
IDLE_BYTES_MAX = 1 << 30  # A process holds at most this much for samples to come.


def fresh(num_bytes: int) -> memoryview:
    """New memory, from numpy because it asks for huge pages where torch does not: a third of the cost."""
    return _aligned(np.empty(num_bytes + ALIGNMENT_BYTES, dtype=np.uint8), num_bytes)


class Landing:
    def __init__(self) -> None:
        # Each list operation below is one step for other threads, and for a finalizer in this one.
        self._idle: list[np.ndarray] = []

    @property
    def idle_bytes(self) -> int:
        return sum(block.nbytes for block in self._idle.copy())

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes < RECYCLED_BYTES_MIN:
            return fresh(num_bytes)
        # Sizes are rounded up, so that samples of nearly equal length take each other's place.
        step = 1 << (num_bytes.bit_length() - 3)
        size = -(-num_bytes // step) * step + ALIGNMENT_BYTES
        block = self._idle_block(size)
        if block is None:
            block = np.empty(size, dtype=np.uint8)
        lent = block.view()  # What tensors hold on to; the block itself outlives it.
        weakref.finalize(lent, self._give_back, block).atexit = False
        return _aligned(lent, num_bytes)

    def _idle_block(self, size: int) -> np.ndarray | None:
        for _ in range(len(self._idle)):
            try:
                block = self._idle.pop()
            except IndexError:  # Another thread took it.
                return None
            if block.nbytes == size:
                return block
            self._idle.insert(0, block)
        return None

    def _give_back(self, block: np.ndarray) -> None:
        self._idle.append(block)
        while self.idle_bytes > IDLE_BYTES_MAX:
            self._idle.pop(0)


def _aligned(block: np.ndarray, num_bytes: int) -> memoryview:
    start = -block.__array_interface__["data"][0] % ALIGNMENT_BYTES
    return block.data[start : start + num_bytes]
