"""Bugs planted in the Python part of the ledger on a server: the tests must find each."""

from __future__ import annotations

from typing import Any

from paceline.ledger.stores.redis import failures, server
from paceline.ledger.stores.redis.calls import Calls
from paceline.ledger.stores.redis.link import Link
from paceline.ledger.stores.redis.reading import Reading
from paceline.ledger.stores.redis.requirements import Requirements
from paceline.ledger.stores.redis.server import Server
from paceline.testing.mutants_changes import Mutant, nothing


def without_waiting(real: Any) -> Any:
    def call(self: Calls, *args: Any, final: bool = False, **kwargs: Any) -> Any:
        return real(self, *args, final=False, **kwargs)

    return call


def always_repeatable(real: Any) -> Any:
    def ask(self: Server, commands: Any, *, repeatable: bool, reply_s: float | None = None) -> Any:
        return real(self, commands, repeatable=True, reply_s=reply_s)

    return ask


def once(real: Any) -> Any:
    """Only the first connection is looked at."""

    def admit(self: Requirements, link: Link) -> None:
        if not vars(self).setdefault("_admitted", False):
            real(self, link)
            vars(self)["_admitted"] = True

    return admit


def first_page(real: Any) -> Any:
    def ask(self: Reading, name: str, *arguments: Any) -> Any:
        answer = real(self, name, *arguments)
        return [*answer[:-1], None] if name == "read" else answer

    return ask


def kept(_: Any) -> Any:
    return Server._put_back


def left_open(_: Any) -> Any:
    return lambda self, reply_s: self._connection.read_response(disconnect_on_error=False)


def taken_for_sound(_: Any) -> Any:
    return lambda self: True


def never_passing(_: Any) -> Any:
    return lambda error: False


CLIENT_MUTANTS: dict[str, Mutant] = {
    "what was seen is forgotten": Mutant(
        "a client goes on with a ledger that lost its changes", ((Calls, "_remember", nothing),)
    ),
    "a broken connection is used again": Mutant(
        "a call gets another call's answer",
        ((Server, "_drop", kept), (Link, "is_sound", taken_for_sound), (Link, "_reply", left_open)),
    ),
    "the disk's answer is not read": Mutant(
        "a head may be in memory alone", ((Calls, "_refuse_unsynced", nothing),)
    ),
    "nothing waits for the disk": Mutant(
        "durable weights depend on what is not", ((Calls, "_call", without_waiting),)
    ),
    "a call without a number is repeated": Mutant(
        "a change is made twice, and nobody knows", ((Server, "ask", always_repeatable),)
    ),
    "a child speaks on its parent's connections": Mutant(
        "answers reach the wrong process", ((Server, "_leave_parents", nothing),)
    ),
    "only the first connection is looked at": Mutant(
        "a failover leads to a server that loses the ledger", ((Requirements, "admit", once),)
    ),
    "a page of the log is taken for the log": Mutant(
        "a step is trained without its last samples", ((Calls, "_ask", first_page),)
    ),
    "a server that steps down ends the run": Mutant(
        "a failover stops every role",
        ((failures, "is_passing", never_passing), (server, "is_passing", never_passing)),
    ),
}
