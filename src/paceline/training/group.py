"""Group: the ranks of one training as processes, over torch.distributed. Nothing that is sent is pickled.

Messages and copies go through gloo. Gradients go through NCCL if they lie on CUDA devices, else through gloo;
both give every rank the same bits, and the same bits again in another run of as many ranks. A rank that dies
closes its connections, so the others know at once; one that hangs is waited for until the time-out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from paceline.durable_files import FileContent
from paceline.errors import RanksError
from paceline.training.link import Place, lost

FRAME = 1 << 12  # bytes of a message that travel in one piece; longer ones take a second
LENGTH = 8  # of these, the first hold the message's length
LOOPBACK = "lo"
JOIN_S = 120.0  # ranks may come so far apart, however short the time-out is: they load what they need first
T = TypeVar("T")


class Group:
    """A Link; also sums tensors over the ranks."""

    def __init__(self, place: Place, *, timeout_s: float, device: torch.device) -> None:
        """Waits for all ranks to come. Raises RanksError if one does not come within `timeout_s` or `JOIN_S`.

        `timeout_s`: how long each later call waits for the others.
        """
        self.rank, self.size = place.rank, place.ranks
        if place.is_one_host:  # no other host needs to reach these sockets
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
        backend = (
            "cpu:gloo,cuda:nccl" if device.type == "cuda" and distributed.is_nccl_available() else "gloo"
        )
        timeout = timedelta(seconds=timeout_s)

        def join() -> None:
            distributed.init_process_group(
                backend,
                store=None if _torchrun_has_store() else _store(place, timeout),
                rank=-1 if _torchrun_has_store() else place.rank,
                world_size=-1 if _torchrun_has_store() else place.ranks,
                timeout=timeout,
            )

        self._or_lost(join)

    def tell(self, message: bytes) -> None:
        self._or_lost(lambda: self._broadcast(message))

    def hear(self) -> bytes:
        return self._or_lost(lambda: self._broadcast(None))

    def exchange(self, message: bytes) -> list[bytes]:
        return self._or_lost(lambda: self._gather(message))

    def copy(self, content: FileContent | None, num_bytes: int) -> FileContent:
        if not num_bytes:
            return b""

        def act() -> FileContent:
            if content is None:
                data = torch.empty(num_bytes, dtype=torch.uint8)
            else:
                data = torch.frombuffer(
                    content if isinstance(content, memoryview) else bytearray(content), dtype=torch.uint8
                )
            distributed.broadcast(data, 0)
            return data.numpy().data

        return self._or_lost(act)

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum each of these over all ranks, in place."""

        def act() -> None:
            for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

        self._or_lost(act)

    def leave(self) -> None:
        distributed.destroy_process_group()

    # -- framing ---------------------------------------------------------------------------

    def _broadcast(self, message: bytes | None) -> bytes:
        frame = _framed(message or b"")
        distributed.broadcast(frame, 0)
        said, size = _parts(frame)
        if size > len(said):
            rest = torch.empty(size - len(said), dtype=torch.uint8)
            if message is not None:
                rest.copy_(torch.frombuffer(bytearray(message[len(said) :]), dtype=torch.uint8))
            distributed.broadcast(rest, 0)
            said += rest.numpy().tobytes()
        return said

    def _gather(self, message: bytes) -> list[bytes]:
        frames = _gathered(_framed(message), self.size)
        found = [_parts(frame) for frame in frames]
        longest = max(size - len(said) for said, size in found)
        if longest <= 0:
            return [said for said, _ in found]
        rest = torch.zeros(longest, dtype=torch.uint8)
        mine = message[FRAME - LENGTH :]
        if mine:
            rest[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        rests = _gathered(rest, self.size)
        return [
            said + other[: size - len(said)].numpy().tobytes()
            for (said, size), other in zip(found, rests, strict=True)
        ]

    def _or_lost(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except RuntimeError as error:  # torch has no class of its own for all of them
            raise _lost(error) from error


def _lost(error: Exception) -> RanksError:
    said = str(error).partition("\n")[0]
    return lost(said.rpartition("] ")[2][:300] or type(error).__name__)


def _framed(message: bytes) -> torch.Tensor:
    frame = bytearray(FRAME)
    frame[:LENGTH] = len(message).to_bytes(LENGTH, "little")
    part = message[: FRAME - LENGTH]
    frame[LENGTH : LENGTH + len(part)] = part
    return torch.frombuffer(frame, dtype=torch.uint8)


def _parts(frame: torch.Tensor) -> tuple[bytes, int]:
    """What the frame holds of the message, and the message's length."""
    data = frame.numpy().tobytes()
    size = int.from_bytes(data[:LENGTH], "little")
    return data[LENGTH : LENGTH + min(size, FRAME - LENGTH)], size


def _gathered(own: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    parts = [torch.empty_like(own) for _ in range(ranks)]
    distributed.all_gather(parts, own)
    return parts


def _torchrun_has_store() -> bool:
    """Whether torchrun's agent has opened the place where the ranks meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _store(place: Place, timeout: timedelta) -> TCPStore:
    is_first = place.rank == 0
    return TCPStore(
        place.address,
        place.port,
        place.ranks,
        is_first,
        max(timeout, timedelta(seconds=JOIN_S)),
        master_listen_fd=place.listens if is_first else None,
    )
