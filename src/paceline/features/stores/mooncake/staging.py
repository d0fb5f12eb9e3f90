"""Memory that Mooncake's client may read and write, and the way of tensors into it.

On a network with RDMA such memory is registered, which is slow; so buffers are kept and used again. From a
GPU tensors are copied on streams of their own into pinned memory, and computation goes on meanwhile.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from paceline.features import codec
from paceline.features.stores.mooncake.link import Link

SMALLEST_BYTES = 1 << 20
KEPT_MAX = 4  # as many threads read or write at a time


class Buffer:
    """Registered memory: `content` is uint8 [num_bytes], on the CPU."""

    def __init__(self, link: Link, num_bytes: int, *, pinned: bool = False) -> None:
        """`pinned`: page-locked, for copies of a GPU. Raises StoreError."""
        memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.num_bytes, self.address, self.pinned = num_bytes, memory.data_ptr(), pinned
        self.content: memoryview = memory.numpy().data  # it keeps the memory alive
        link.register(self.address, num_bytes)
        # Memory that is given back registered could not be registered again by its next owner.
        self.free = weakref.finalize(self, link.unregister, self.address)


class Staging:
    """Buffers of one link. Any thread may borrow one."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._idle: list[Buffer] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def borrow(self, num_bytes: int, *, pinned: bool = False) -> Iterator[Buffer]:
        """A buffer of at least so many bytes, whose content is arbitrary."""
        with self._lock:
            found = next(
                (one for one in self._idle if one.num_bytes >= num_bytes and one.pinned >= pinned), None
            )
            if found is not None:
                self._idle.remove(found)
        buffer = found or Buffer(self._link, _power_of_two(num_bytes), pinned=pinned)
        try:
            yield buffer
        finally:
            self._give_back(buffer)

    def _give_back(self, buffer: Buffer) -> None:
        """Of too many the smallest goes, so that a run ends up with those that fit its largest samples."""
        with self._lock:
            self._idle.append(buffer)
            self._idle.sort(key=lambda one: one.num_bytes)
            gone = self._idle[:-KEPT_MAX]
            self._idle = self._idle[-KEPT_MAX:]
        for one in gone:
            one.free()

    def fill(
        self, buffer: Buffer, layout: codec.Layout, description: bytes, tensors: Mapping[str, Any]
    ) -> str:
        """Copy the tensors into the buffer; returns the digest of the copy."""
        devices = {tensors[name].device for name in layout.specs if tensors[name].is_cuda}
        if not devices:
            return codec.write(layout, description, tensors, buffer.content)
        streams = [self._begin(device) for device in devices]
        for place in layout.places:
            tensor = tensors[place.name].detach()
            if tensor.is_cuda:
                stream = self._streams[tensor.device]
                with torch.cuda.stream(stream):
                    codec.typed(place, buffer.content).copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)  # its memory is not used again before the copy is done
            else:
                codec.typed(place, buffer.content).copy_(tensor)
        for stream in streams:
            stream.synchronize()
        return codec.digest_of(layout, description, buffer.content)

    def _begin(self, device: torch.device) -> torch.cuda.Stream:
        """The device's side stream, which begins after what computes the tensors."""
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    def close(self) -> None:
        with self._lock:
            gone, self._idle = self._idle, []
        for one in gone:
            one.free()


def _power_of_two(num_bytes: int) -> int:
    return max(SMALLEST_BYTES, 1 << max(0, num_bytes - 1).bit_length())
