"""A Link over sockets, for ranks that are threads or forks: no torch, and as quick as a pipe.

Every message of rank 0 goes to each other rank by itself; theirs go to rank 0, which passes them on.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from paceline.durable_files import FileContent
from paceline.training.link import lost

LENGTH = 8  # bytes before a message


class SocketLink:
    def __init__(self, rank: int, size: int, sockets: Sequence[socket.socket], timeout_s: float) -> None:
        """`sockets`: rank 0's one to each other rank, in their order; another rank's one to rank 0."""
        self.rank, self.size = rank, size
        self._sockets = list(sockets)
        for one in self._sockets:
            one.settimeout(timeout_s)

    def tell(self, message: bytes) -> None:
        for place in range(len(self._sockets)):
            self._send(place, message)

    def hear(self) -> bytes:
        return self._receive(0)

    def exchange(self, message: bytes) -> list[bytes]:
        if self.rank == 0:
            said = [message, *(self._receive(place) for place in range(len(self._sockets)))]
            for one in said:
                self.tell(one)
            return said
        self._send(0, message)
        return [self._receive(0) for _ in range(self.size)]

    def copy(self, content: FileContent | None, num_bytes: int) -> FileContent:
        if content is None:
            return self._receive(0)
        self.tell(bytes(content))
        return content

    def leave(self) -> None:
        for one in self._sockets:
            one.close()

    def _send(self, place: int, message: bytes) -> None:
        try:
            self._sockets[place].sendall(len(message).to_bytes(LENGTH, "little") + message)
        except OSError as error:
            raise lost(f"rank {place + 1 if self.rank == 0 else 0}: {error}") from error

    def _receive(self, place: int) -> bytes:
        size = int.from_bytes(self._read(place, LENGTH), "little")
        return self._read(place, size)

    def _read(self, place: int, size: int) -> bytes:
        other = place + 1 if self.rank == 0 else 0
        data = bytearray()
        while len(data) < size:
            try:
                part = self._sockets[place].recv(size - len(data))
            except OSError as error:
                raise lost(f"rank {other}: {error}") from error
            if not part:
                raise lost(f"rank {other} closed the connection")
            data += part
        return bytes(data)


def socket_links(ranks: int, timeout_s: float = 60.0) -> list[SocketLink]:
    """The links of so many ranks, in rank order."""
    pairs = [socket.socketpair() for _ in range(1, ranks)]
    first = SocketLink(0, ranks, [ours for ours, _ in pairs], timeout_s)
    others = [SocketLink(n, ranks, [theirs], timeout_s) for n, (_, theirs) in enumerate(pairs, 1)]
    return [first, *others]
