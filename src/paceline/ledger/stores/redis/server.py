"""The server as a ledger calls it: connections, waiting while it is away, and results that got lost.

A call that was not sent, or that the server refused to begin, is sent again until the caller's patience ends.
One whose connection broke after it was sent may have been made: if it cannot be repeated without harm,
UnknownResultError says so, and a session repeats it under its operation number.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ConnectionError,  # noqa: A004 (redis-py's name)
    NoScriptError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from paceline.errors import LedgerError
from paceline.ledger.stores.redis.address import Address
from paceline.ledger.stores.redis.failures import away, explained, is_passing, unknown
from paceline.ledger.stores.redis.link import Command, Link

PATIENCE_S = 60.0
PAUSES_S = (0.02, 1.0)  # between two tries: the first one, doubled up to the last one
Commands = Callable[[Link, bool], Sequence[Command]]  # for this link; with the scripts' texts?


class Server:
    sleep: Callable[[float], None] = staticmethod(time.sleep)
    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, address: Address, patience_s: float, admit: Callable[[Link], None]) -> None:
        """`admit` raises for a server on which the ledger must not be."""
        self.address = address
        self._patience_s, self._admit = patience_s, admit
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._busy: set[Link] = set()
        self._process = os.getpid()
        self.is_closed = False

    def ask(self, commands: Commands, *, repeatable: bool, reply_s: float | None = None) -> list[Any]:
        """Send the commands over one connection; returns their replies.

        Raises LedgerError if the server stays away or refuses, UnknownResultError if the connection broke
        after commands were sent that are not `repeatable`.
        """
        deadline, pause, whole = self.clock() + self._patience_s, PAUSES_S[0], False
        while True:
            try:
                return self._try(commands, whole, repeatable=repeatable, reply_s=reply_s)
            except NoScriptError:
                if whole:
                    raise
                whole = True
                continue
            except (AuthenticationError, AuthorizationError) as error:
                raise explained(error, self.address) from None
            except (ConnectionError, TimeoutError, OSError, ResponseError) as error:
                self._refuse_closed()
                if isinstance(error, ResponseError) and not is_passing(error):
                    raise explained(error, self.address) from error
                if self.clock() + pause > deadline:
                    raise away(error, self.address, self._patience_s) from error
            self.sleep(pause)
            pause = min(2 * pause, PAUSES_S[1])

    def _try(self, commands: Commands, whole: bool, *, repeatable: bool, reply_s: float | None) -> list[Any]:
        link = self._take()
        try:
            replies = link.ask(commands(link, whole), reply_s)
            if repeatable:
                _refuse_passing(replies)
        except (BusyLoadingError, AuthenticationError, AuthorizationError):  # it was not begun
            self._drop(link)
            raise
        except ResponseError as error:
            self._drop(link) if is_passing(error) else self._put_back(link)  # another one may be the primary
            raise
        except (ConnectionError, TimeoutError, OSError) as error:
            self._drop(link)
            if repeatable:
                raise
            raise unknown(error, self.address) from error
        except BaseException:
            self._drop(link)
            raise
        self._put_back(link)
        return replies

    # -- connections -----------------------------------------------------------------------

    def _take(self) -> Link:
        self._refuse_closed()
        while (link := self._idle_link()) is not None:
            if link.is_sound():
                break
            link.close()
        if link is None:
            link = Link(self.address)
            try:
                self._admit(link)
            except BaseException:
                link.close()
                raise
        with self._lock:
            self._busy.add(link)
        if self.is_closed:  # `close` may have come while this thread connected, and not have seen the link
            self._drop(link)
        self._refuse_closed()
        return link

    def _idle_link(self) -> Link | None:
        with self._lock:
            self._leave_parents()
            return self._idle.pop() if self._idle else None

    def _leave_parents(self) -> None:
        """A child must neither speak on its parent's connections nor end them."""
        if self._process != os.getpid():
            self._idle, self._busy, self._process = [], set(), os.getpid()

    def _put_back(self, link: Link) -> None:
        with self._lock:
            self._busy.discard(link)
            if not self.is_closed:
                self._idle.append(link)
                return
        link.close()

    def _drop(self, link: Link) -> None:
        with self._lock:
            self._busy.discard(link)
        link.close()

    def _refuse_closed(self) -> None:
        if self.is_closed:
            raise LedgerError(f"The ledger on {self.address} is closed.", next="open it again.")

    def close(self) -> None:
        """Idempotent. A call that waits for its reply ends with LedgerError."""
        with self._lock:
            self._leave_parents()
            self.is_closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for link in idle:
            link.close()
        for link in busy:
            link.interrupt()


def _refuse_passing(replies: Sequence[Any]) -> None:
    """Raise what the server refused of a call that may be made again."""
    for reply in replies:
        if isinstance(reply, ResponseError) and is_passing(reply):
            raise reply
