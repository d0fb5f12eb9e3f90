"""What a server must be like before a ledger may lie on it."""

from __future__ import annotations

from typing import Literal

from redis.exceptions import BusyLoadingError, NoPermissionError, ReadOnlyError, ResponseError

from paceline.errors import ConfigError, PacelineError, SchemaError
from paceline.ledger.stores.redis.address import Address
from paceline.ledger.stores.redis.link import Link
from paceline.ledger.stores.redis.server import Server

Durability = Literal["full", "head"]
FLOOR = (7, 2)  # of Redis, and of Valkey, which began there: the first one with WAITAOF
NO_EVICTION = "noeviction"


def examined(url: str, durability: Durability, patience_s: float = 5.0) -> list[str]:
    """Whether a ledger may lie on the server; what could not be verified, in words. Nothing is written.

    Raises what opening the ledger would raise.
    """
    requirements = Requirements(address := Address(url), durability)
    server = Server(address, patience_s, requirements.admit)
    try:
        server.ask(lambda _link, _whole: [["PING"]], repeatable=True)
    finally:
        server.close()
    return list(requirements.unverified)


class Requirements:
    """Checks every new connection, because a failover may lead to a server with other settings."""

    def __init__(self, address: Address, durability: Durability) -> None:
        self.address, self.durability = address, durability
        self.unverified: tuple[str, ...] = ()  # what the server keeps to itself, in words

    def admit(self, link: Link) -> None:
        """Raises ConfigError with the setting to change, SchemaError for an old version.

        A server that loads its data or is a replica raises redis-py's error: it is waited for.
        """
        facts = link.facts
        if not facts:
            raise self._refused(
                "does not let this user use the command INFO",
                "Without it Paceline cannot tell whether the server may lose the ledger.",
                "ACL SETUSER ... +info",
            )
        if facts.get("loading") == "1":  # until then it tells of no append-only file
            raise BusyLoadingError("it loads its data")
        if facts.get("role") == "slave":  # it, or another server, may be the primary soon
            raise ReadOnlyError("it is a replica")
        self._check_version(facts.get("valkey_version") or facts.get("redis_version", "0"))
        if (policy := facts.get("maxmemory_policy", "")) != NO_EVICTION:
            raise self._refused(
                f"may evict keys (maxmemory-policy {policy or 'unknown'})",
                "An evicted key of the ledger would lose samples.",
                f"CONFIG SET maxmemory-policy {NO_EVICTION}, and the same in the server's configuration",
            )
        if facts.get("aof_enabled") != "1":
            raise self._refused(
                "keeps no append-only file",
                "After a restart it would not know what was trained.",
                "CONFIG SET appendonly yes, and the same in the server's configuration",
            )
        self._check_syncs(link)
        self._check_wait(link)

    def _check_version(self, version: str) -> None:
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers < FLOOR:
            raise SchemaError(
                f"{self.address} is version {version}; the ledger needs Redis 7.2 or Valkey 8, or newer.",
                why="Older servers cannot say whether a change is on their disk (WAITAOF).",
                next="upgrade the server.",
            )

    def _check_syncs(self, link: Link) -> None:
        try:
            [flat] = link.ask([["CONFIG", "GET", "appendfsync", "no-appendfsync-on-rewrite"]])
            found = {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
            syncs = found["appendfsync"]
        except (NoPermissionError, ResponseError, LookupError, ValueError):
            self.unverified = ("appendfsync: the server does not let this user read its configuration",)
            return
        self.unverified = ()
        if syncs == "no" or (self.durability == "full" and syncs != "always"):
            wanted = "always" if self.durability == "full" else "everysec"
            raise self._refused(
                f"syncs its append-only file too rarely (appendfsync {syncs})",
                f"The run asks for durability {self.durability!r} (docs/guarantees.md).",
                f"CONFIG SET appendfsync {wanted}, and the same in the server's configuration; "
                "or set ledger.durability: head in the run file",
            )

        if found.get("no-appendfsync-on-rewrite") == "yes":
            raise self._refused(
                "does not sync its append-only file while it rewrites it (no-appendfsync-on-rewrite yes)",
                "A checkpoint would wait for each rewrite, and a power failure take all since its start.",
                "CONFIG SET no-appendfsync-on-rewrite no, and the same in the server's configuration",
            )

    def _check_wait(self, link: Link) -> None:
        try:
            link.ask([["WAITAOF", "0", "0", "1"]])
        except NoPermissionError:
            raise self._refused(
                "does not let this user use the command WAITAOF",
                "With it a checkpoint is known to be on the server's disk.",
                "ACL SETUSER ... +waitaof",
            ) from None

    def _refused(self, what: str, why: str, setting: str) -> PacelineError:
        return ConfigError(f"{self.address} {what}.", why=why, next=f"on the server: {setting}.")
