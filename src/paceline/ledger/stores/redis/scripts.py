"""The Lua scripts, and the names of the keys that they use.

A script is known to the server by its digest, so two versions of Paceline can share one server, and a server
that restarted without scripts is simply sent the text again. All keys of a ledger carry one hash tag, so they
lie in one slot of a cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from paceline.ledger.stores.redis.link import Command

NAMES = (
    *("run", "facts", "incarnations", "changes"),
    *("epochs", "holders", "tokens", "ops", "results"),
    *("source", "prompts", "pending", "leases", "failed", "again", "open", "intents"),
    *("samples", "refs", "log", "resident", "durable", "kept", "provisional", "lost", "quarantined"),
    *("plans", "checkpoints", "archive", "blocks", "archived_ids"),
)
SHARED = ("rows", "state", "calls", "archive")
CHANGES = (*SHARED, "prompts", "samples", "lineage", "steps", "retire", "moving", "changes")
READING = (*SHARED, "reading", "dump", "asking")


def keys_of(ledger: str) -> tuple[str, ...]:
    """Every key of a ledger, in the order of NAMES."""
    return tuple(f"{{paceline:{ledger}}}:{name}" for name in NAMES)


@dataclass(frozen=True)
class Script:
    text: str
    writes: bool

    @property
    def digest(self) -> str:
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def command(self, keys: Sequence[str], arguments: Sequence[bytes | str], *, whole: bool) -> Command:
        """The call of the script by its digest; `whole`: with its text, for a server that lacks it."""
        name = ("EVAL" if whole else "EVALSHA") + ("" if self.writes else "_RO")
        return [name, self.text if whole else self.digest, str(len(keys)), *keys, *arguments]


@cache
def changing() -> Script:
    """The script of every change."""
    return Script(_joined("#!lua", CHANGES), writes=True)


@cache
def reading() -> Script:
    """The script of every question; the server lets it write nothing."""
    return Script(_joined("#!lua flags=no-writes", READING), writes=False)


def _joined(first_line: str, parts: tuple[str, ...]) -> str:
    folder = resources.files("paceline.ledger.stores.redis") / "lua"
    names = ", ".join(f"'{name}'" for name in NAMES)
    keys = f"local KEY = {{}}\nfor at, name in ipairs({{{names}}}) do\n  KEY[name] = KEYS[at]\nend\n"
    return "\n".join((first_line, keys, *((folder / f"{part}.lua").read_text() for part in parts)))
