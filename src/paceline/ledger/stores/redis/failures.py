"""Errors of the server and of the connection, with advice. None repeats a user or a password."""

from __future__ import annotations

import re

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)

from paceline.errors import ConfigError, LedgerError, PacelineError, SchemaError, UnknownResultError
from paceline.ledger.stores.redis.address import PASSWORD, USER, Address

PASSING = (ReadOnlyError, ClusterDownError, TryAgainError)  # MASTERDOWN is a ClusterDownError, too
PASSING_CODES = ("BUSY", "NOREPLICAS", "UNBLOCKED", "LOADING", "MASTERDOWN", "MISCONF")
SAID_MAX = 300


def is_passing(error: ResponseError) -> bool:
    """Whether the server refused to begin the call, and may begin it later."""
    return isinstance(error, PASSING) or str(error).split(" ", 1)[0] in PASSING_CODES


def explained(error: Exception, address: Address) -> PacelineError:
    said = str(error)[:SAID_MAX]
    if isinstance(error, (AuthenticationError, AuthorizationError)):
        return ConfigError(
            f"{address} refuses the login.",
            why="User and password keep other users of the server from the ledger.",
            next=f"check user and password in the URL, or in {USER} and {PASSWORD}.",
        )
    if isinstance(error, NoPermissionError):
        return not_permitted(said, address)
    if isinstance(error, OutOfMemoryError):
        return LedgerError(
            f"{address} has no memory left (maxmemory).",
            why="Nothing was changed; everything recorded before is safe.",
            next="raise maxmemory on the server, or free memory there, and run the same command again.",
        )
    if isinstance(error, AskError):
        return ConfigError(
            f"{address} is not the node of the cluster that holds this ledger.",
            why="A ledger lies in one slot, so on one node.",
            next="put the address of that node into the URL: `CLUSTER SLOTS` on the server lists them.",
        )
    if said.startswith("WRONGTYPE") or "WRONGTYPE" in said:
        return SchemaError(
            f"The ledger's keys on {address} hold something else.",
            why="Another program wrote there, so nothing was changed.",
            next="choose another database or another name for the ledger.",
        )
    return LedgerError(
        f"{address} refused a call: {said}",
        why="Everything recorded before is safe.",
        next="check the server and its log, then run the same command again.",
    )


def not_permitted(said: str, address: Address) -> ConfigError:
    command = re.search(r"'([\w|]+)' command", said)
    what = f"the command {command[1].upper()}" if command else "the ledger's keys"
    return ConfigError(
        f"{address} does not let this user use {what}.",
        why="The ledger needs it. Nothing was changed.",
        next="extend the user's rules (ACL SETUSER): docs/operations.md lists the commands and keys.",
    )


def away(error: Exception, address: Address, patience_s: float) -> LedgerError:
    """What was waited for did not come."""
    if str(error).startswith("MISCONF"):
        return LedgerError(
            f"{address} could not write to its disk for {patience_s:g} seconds (MISCONF).",
            why="It makes no changes until it can; the newest ones are in its memory alone.",
            next="do not stop the server: free space on its disk, then run the same command again.",
        )
    return LedgerError(
        f"{address} did not answer for {patience_s:g} seconds ({str(error)[:SAID_MAX]}).",
        why="Nothing was changed by this call; everything recorded before is as safe as the server keeps it.",
        next="start the server or repair the network, then run the same command again.",
    )


def unknown(error: Exception, address: Address) -> UnknownResultError:
    return UnknownResultError(
        f"The connection to {address} broke before a call was answered ({str(error)[:SAID_MAX]}).",
        why="Whether the change was made is unknown.",
        next="repeat the call under its operation number, or run the same command again.",
    )
