"""The metadata store in one SQLite file, opened by every process of a run on one host.

Each base class is one part of the contract in ledger/store.py; `Database` below them all says what
a transaction is and what survives which fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from paceline.ledger.records import Fence
from paceline.ledger.store import MetadataStore
from paceline.ledger.stores.sqlite.database import Durability
from paceline.ledger.stores.sqlite.steps import StepTable


class SQLiteMetadataStore(StepTable, MetadataStore):
    durable = True

    def __init__(
        self, path: str | os.PathLike[str], *, durability: Durability = "full", vfs: str | None = None
    ) -> None:
        """`durability`: which calls are on the disk on return, see `Database`; "full" is every one.

        `vfs`: the SQLite file layer, for tests that drop writes. Raises SchemaError for a file that is
        damaged, another program's or a newer version's; ConfigError on a network filesystem.
        """
        super().__init__(path, durability, vfs)

    # -- roles -----------------------------------------------------------------------------

    def acquire_role(self, role: str, holder: str) -> Fence:
        with self._mutation(None, final=True):
            self._change(
                "INSERT INTO role VALUES (?, 1, ?) "
                "ON CONFLICT (name) DO UPDATE SET epoch = epoch + 1, holder = excluded.holder",
                *(role, holder),
            )
            if role == "producer":
                self._change("DELETE FROM intent")
                self._change(
                    "UPDATE task SET state = 'pending', holder = '', deaths = deaths + 1 "
                    "WHERE state = 'leased'"
                )
            if role == "consumer":
                self._change("DELETE FROM ack WHERE durable = 0")
                run = self._run()
                self._change("UPDATE plan SET deaths = deaths + 1 WHERE step = ?", run.started_step)
                run.started_step = None
                run.trained_step = self._value("SELECT coalesce(max(step), 0) FROM checkpoint")
            epoch = self._value("SELECT epoch FROM role WHERE name = ?", role)
            return Fence(role, epoch, self._run().next_generation)

    def role_epochs(self) -> dict[str, int]:
        return dict(self._rows("SELECT name, epoch FROM role"))

    # -- run -------------------------------------------------------------------------------

    def set_facts(self, facts: Mapping[str, Any], *, fence: Fence | None = None) -> None:
        rows = [(key, json.dumps(value)) for key, value in facts.items()]
        with self._mutation(fence):
            self._db.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?)", rows)

    def settle_facts(self, facts: Mapping[str, Any], *, fence: Fence | None = None) -> dict[str, Any]:
        with self._mutation(fence, final=True):
            known = self.facts()
            standing = {key: known[key] for key in facts if key in known}
            if not standing:
                rows = [(key, json.dumps(value)) for key, value in facts.items()]
                self._db.executemany("INSERT INTO fact VALUES (?, ?)", rows)
                standing = {key: json.loads(text) for key, text in rows}
            return standing

    def facts(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._rows("SELECT key, value FROM fact")}

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        return self._bell.wait_for_change(self.lsn, seen_lsn, timeout_s)
