"""The Lua scripts, and the names of the keys that they use.

A script is known to the server by its digest, so two versions of Paceline can share one server, and a server
that restarted without scripts is simply sent the text again. All keys of a ledger carry one hash tag, so they
lie in one slot of a cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

from paceline.ledger.stores.redis.link import packed_words

NAMES = (
    *("run", "facts", "incarnations", "changes"),
    *("epochs", "holders", "tokens", "ops", "results"),
    *("source", "prompts", "pending", "leases", "failed", "again", "open", "intents"),
    *("samples", "refs", "log", "durable", "kept", "provisional", "lost", "quarantined"),
    *("plans", "checkpoints", "archive", "blocks", "archived_ids"),
)
SHARED = ("rows", "state", "calls")
CHANGES = (*SHARED, "archive", "prompts", "samples", "lineage", "steps", "retire", "moving", "changes")
READING = (*SHARED, "archive", "reading", "dump", "asking")
# A server makes the functions of a script anew at each call, so what is called often loads what it needs.
PARTS = {
    "lease": (*SHARED, "prompts", "changes"),
    "give_back": (*SHARED, "prompts", "changes"),
    "reserve": (*SHARED, "samples", "changes"),
    "commit": (*SHARED, "archive", "prompts", "samples", "changes"),
    "plan": (*SHARED, "steps", "changes"),
    "set_facts": (*SHARED, "changes"),
    "lsn": (*SHARED, "reading", "asking"),
    "read": (*SHARED, "reading", "asking"),
}


def keys_of(ledger: str) -> tuple[str, ...]:
    """Every key of a ledger, in the order of NAMES."""
    return tuple(f"{{paceline:{ledger}}}:{name}" for name in NAMES)


@dataclass(frozen=True)
class Script:
    text: str
    writes: bool

    @cached_property
    def digest(self) -> str:
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def command(self, keys: tuple[str, ...], arguments: Sequence[bytes | str], *, whole: bool) -> bytes:
        """The packed call of the script by its digest; `whole`: with its text, for a server that lacks it."""
        count = b"*%d\r\n" % (3 + len(keys) + len(arguments))
        return count + _opening(self, keys, whole) + packed_words(arguments)


@cache
def _opening(script: Script, keys: tuple[str, ...], whole: bool) -> bytes:
    """What all calls of a script for one ledger begin with."""
    name = ("EVAL" if whole else "EVALSHA") + ("" if script.writes else "_RO")
    return packed_words([name, script.text if whole else script.digest, str(len(keys)), *keys])


@cache
def changing(name: str) -> Script:
    """The script that makes this change."""
    return Script(_joined("#!lua", PARTS.get(name, CHANGES)), writes=True)


@cache
def reading(name: str) -> Script:
    """The script that answers this question; the server lets it write nothing."""
    return Script(_joined("#!lua flags=no-writes", PARTS.get(name, READING)), writes=False)


def _joined(first_line: str, parts: tuple[str, ...]) -> str:
    folder = resources.files("paceline.ledger.stores.redis") / "lua"
    names = ", ".join(f"{name} = KEYS[{at}]" for at, name in enumerate(NAMES, start=1))
    keys = f"local KEY = {{{names}}}\n"
    return "\n".join((first_line, keys, *((folder / f"{part}.lua").read_text() for part in parts)))
