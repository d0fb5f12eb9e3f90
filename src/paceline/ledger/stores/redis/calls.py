"""One call of a script: what it is told, what it answers, and what this client has seen of the ledger so far.

Every call carries the newest change that this client knows of, and under which process of the server it saw
it. The script refuses a client that knows more than the ledger: an old append-only file was loaded, or a
failover lost writes. The ledger notes at which change each process of the server began, so a loss is noticed
even when others have made new changes since (like the epochs of a replicated log).
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from paceline.errors import ConfigError, LedgerMissingError, LedgerRegressedError, UnknownResultError
from paceline.ledger.records import Fence
from paceline.ledger.stores.redis.failures import SAID_MAX
from paceline.ledger.stores.redis.link import Command, Link
from paceline.ledger.stores.redis.replies import fence_refused, not_the_same, other_schema, refused
from paceline.ledger.stores.redis.scripts import Script, changing, keys_of, reading
from paceline.ledger.stores.redis.server import Server

SYNC_S = 20.0  # how long one call waits until the server's disk has a change
NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


@dataclass(frozen=True)
class Position:
    """How far a ledger was once: change `lsn`, under the `incarnation`-th process of the server."""

    identity: str
    incarnation: int
    lsn: int
    server: str

    def __str__(self) -> str:
        return f"{self.identity}/{self.incarnation}/{self.lsn}/{self.server}"

    @classmethod
    def parsed(cls, text: str) -> Position:
        """The inverse of str. Raises ValueError."""
        identity, incarnation, lsn, server = text.split("/")
        return cls(identity, int(incarnation), int(lsn), server)


def encoded(values: Any) -> bytes:
    """Raises TypeError for what a script cannot take."""
    return msgspec.msgpack.encode(values, enc_hook=_plain_text)


def _plain_text(value: Any) -> str:
    """The text of a subclass of str, such as numpy's."""
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"a {type(value).__name__} cannot be written into the ledger")


class Calls:
    def __init__(self, server: Server, name: str, *, durability: str) -> None:
        """Raises ConfigError for a name that cannot be part of a key."""
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be a ledger's name.",
                why="It becomes part of the server's keys.",
                next="use letters, digits, '.', '_' and '-', at most 200.",
            )
        self.name, self._server, self._durability = name, server, durability
        self._keys = keys_of(name)
        self._told = threading.Lock()
        self._seen: Position | None = None

    def __str__(self) -> str:
        return f"The ledger {self.name} on {self._server.address}"

    # -- calls -----------------------------------------------------------------------------

    def _ask(self, name: str, *arguments: Any) -> Any:
        """The answer to a question (lua/reading.lua)."""
        values = encoded(arguments)

        def commands(_: Link, whole: bool) -> list[Command]:
            return [self._command(reading(name), name, self._context(), values, whole)]

        [reply] = self._server.ask(commands, repeatable=True)
        return self._taken(reply)

    def _call(
        self,
        name: str,
        fence: Fence | None,
        *arguments: Any,
        final: bool = False,
        repeatable: bool = False,
        subject: Any = None,
    ) -> Any:
        """The result of a change (lua/changes.lua).

        `final`: durable weights depend on it, so it is on the server's disk on return. `repeatable`: making
        it twice does no harm. Raises UnknownResultError, and what the operation refuses.
        """
        syncs, values = final or self._durability == "full", encoded(arguments)
        role = (None, None, None, "") if fence is None else (fence.role, fence.epoch, fence.op, fence.worker)

        def commands(link: Link, whole: bool) -> list[Command]:
            context = (*self._context(), link.server, *role[:3], syncs, role[3])
            call = self._command(changing(name), name, context, values, whole)
            return [call, ("WAITAOF", "1", "0", str(int(SYNC_S * 1000)))] if syncs else [call]

        reply, *synced = self._server.ask(commands, repeatable=repeatable)
        result = self._taken(reply, fence, subject)
        if synced:
            self._refuse_unsynced(synced[0])
        return result

    def _refuse_unsynced(self, reply: Any) -> None:
        if isinstance(reply, ResponseError):
            what = f"may not have reached the server's disk ({str(reply)[:SAID_MAX]})"
        else:
            what = f"did not reach the server's disk within {SYNC_S:g} seconds"
        if isinstance(reply, ResponseError) or reply[0] < 1:
            raise UnknownResultError(
                f"{self} has a change that {what}.",
                why="A power failure could still undo it.",
                next="check the server's disk, its settings and its log, then run the same command again.",
            )

    def _command(
        self, script: Script, name: str, context: tuple[Any, ...], values: bytes, whole: bool
    ) -> Command:
        return script.command(self._keys, (name, encoded(context), values), whole=whole)

    def _context(self) -> tuple[Any, ...]:
        seen = self._seen
        if seen is None:
            return (None, 0, "", 0)
        return (seen.identity, seen.incarnation, seen.server, seen.lsn)

    def _taken(self, reply: Any, fence: Fence | None = None, subject: Any = None) -> Any:
        status, lsn, incarnation, server, packed = reply
        status, detail = status.decode(), msgspec.msgpack.decode(packed)
        if status == "ok":
            self._remember(incarnation, server.decode(), lsn)
            return detail
        if status in ("fenced", "late"):
            assert fence is not None, "only a call with a fence can be fenced"
            raise fence_refused(status, detail, fence)
        if status == "schema":
            raise other_schema(str(self), detail)
        if status in ("missing", "copying", "other", "regressed"):
            raise self._not_the_same(status, lsn)
        raise refused(status, detail, subject)

    def _not_the_same(self, status: str, lsn: int) -> LedgerRegressedError | ConfigError:
        if self._seen is None and status == "copying":
            return LedgerMissingError(
                f"{self} is a copy that is not whole.",
                why="The process that makes it is still at work, or was interrupted; no run uses it.",
                next="copy the ledger again.",
            )
        if self._seen is None:
            return LedgerMissingError(
                f"There is no ledger {self.name} on {self._server.address}.",
                why="A run's ledger exists from its first start on.",
                next="paceline train RUN.yaml, or check the URL.",
            )
        return not_the_same(str(self), _lack(status, lsn, self._seen))

    # -- positions -------------------------------------------------------------------------

    def _remember(self, incarnation: int, server: str, lsn: int) -> None:
        with self._told:
            seen = self._seen
            if seen is not None and (incarnation, lsn) > (seen.incarnation, seen.lsn):
                self._seen = Position(seen.identity, incarnation, lsn, server)

    def know(self) -> None:
        """Learn which ledger this is, so that no other one is taken for it later."""
        self._seen = Position(*self._ask("position"))

    @property
    def identity(self) -> str:
        """The random name of this ledger: another one for a copy."""
        assert self._seen is not None, "asked for at opening"
        return self._seen.identity

    def position(self) -> str:
        """How far the ledger is, as text for `missing_since`."""
        self._ask("lsn")
        return str(self._seen)

    def missing_since(self, position: str) -> str:
        """What the ledger lacks of what it held at an earlier position, in words; "" for nothing.

        Raises ValueError for text that `position` did not write.
        """
        known = Position.parsed(position)
        context = (known.identity, known.incarnation, known.server, known.lsn)
        values = encoded(())

        def commands(_: Link, whole: bool) -> list[Command]:
            return [self._command(reading("lsn"), "lsn", context, values, whole)]

        [[status, lsn, *_]] = self._server.ask(commands, repeatable=True)
        return "" if status == b"ok" else f"{self} {_lack(status.decode(), lsn, known)}."

    def close(self) -> None:
        """Idempotent; loses nothing."""
        self._server.close()


def _lack(status: str, lsn: int, known: Position) -> str:
    if status in ("missing", "copying"):
        return f"is gone; it held {known.lsn} changes"
    if status == "other":
        return f"is another ledger than the one that held {known.lsn} changes"
    return f"ends at change {lsn} or went on without changes up to {known.lsn}, which were made before"
