"""Link: what the ranks of one training say to each other, as bytes. No torch.

Rank 0 tells all others what to do next (`tell`, `hear`). `exchange` is a meeting: every rank brings a message
and gets all of them. A rank that does not come within the time-out ends the training on all ranks, which then
starts again from its newest checkpoint. Adapters: group.py (torch.distributed), and one over sockets in
testing/socket_link.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from paceline.durable_files import FileContent
from paceline.errors import RanksError


@dataclass(frozen=True)
class Place:
    """One process among the ranks, as torchrun tells it to each.

    `address`, `port`: where rank 0 listens while the ranks meet; `listens`: the descriptor of a socket that
    already listens there, if the supervisor has opened one. `on_host`, `ranks_on_host`: its number among
    the ranks on its host, and how many these are; None if the launcher does not say.
    """

    rank: int
    ranks: int
    address: str
    port: int
    on_host: int | None = 0
    ranks_on_host: int | None = 1
    listens: int | None = None

    @property
    def is_one_host(self) -> bool:
        return self.ranks_on_host == self.ranks


class Link(Protocol):
    """Every call raises RanksError if a rank is gone, is late, or is in another call."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def tell(self, message: bytes) -> None:
        """From rank 0 to all others."""

    def hear(self) -> bytes:
        """On the other ranks: wait for what rank 0 tells."""

    def exchange(self, message: bytes) -> list[bytes]:
        """Called by all ranks; returns the messages of all, in rank order."""

    def copy(self, content: FileContent | None, num_bytes: int) -> FileContent:
        """From rank 0, the only one that gives `content`, to all others, which get it."""

    def leave(self) -> None:
        """After the last call."""


class Alone:
    """The link of a training with one rank: there is no other to tell."""

    rank, size = 0, 1

    def tell(self, message: bytes) -> None:
        """No other rank hears it."""

    def hear(self) -> bytes:
        raise AssertionError("rank 0 tells, and hears no rank")

    def exchange(self, message: bytes) -> list[bytes]:
        return [message]

    def copy(self, content: FileContent | None, num_bytes: int) -> FileContent:
        assert content is not None, f"rank 0 has the {num_bytes} bytes"
        return content

    def leave(self) -> None:
        """There was no other rank."""


def meet(link: Link, call: str, message: bytes) -> list[bytes]:
    """`exchange`, after which every rank knows that all were in the same `call`."""
    pairs = [said.partition(b"\0") for said in link.exchange(call.encode() + b"\0" + message)]
    for rank, (other, _, _) in enumerate(pairs):
        if other.decode(errors="replace") != call:
            raise RanksError(
                f"Rank {rank} is at {other.decode(errors='replace')!r}, and rank {link.rank} is at {call!r}.",
                why="Ranks that do different things would train different weights. Nothing more is trained.",
                next="run the same command again; it goes on from the newest checkpoint. If it comes again, "
                "report it with logs/consumer*.log.",
            )
    return [said for _, _, said in pairs]


def lost(what: str) -> RanksError:
    """A rank does not answer any more."""
    return RanksError(
        f"A rank of this training was lost: {what}.",
        why="No rank trains a step that another one does not. Everything that was checkpointed is safe.",
        next="`paceline train` starts all ranks again by itself; after torchrun, run the same command again. "
        "If the ranks are only slow, raise machine.trainer_timeout_s.",
    )
