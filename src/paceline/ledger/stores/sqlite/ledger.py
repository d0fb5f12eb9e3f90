"""The ledger in one SQLite file, opened by every process of a run on one host.

Each base class implements one part of the contract in ledger/ledger.py; the lowest one, `Database`, defines
a transaction and what survives which fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from paceline.ledger.ledger import Ledger
from paceline.ledger.records import CONSUMER, Fence, Order, PromptCounts, Snapshot
from paceline.ledger.refusals import other_order
from paceline.ledger.stores.sqlite.database import IN_MEMORY, Durability, change
from paceline.ledger.stores.sqlite.steps import StepTable


class SQLiteLedger(StepTable, Ledger):
    def __init__(
        self,
        path: str | os.PathLike[str] = IN_MEMORY,
        *,
        durability: Durability = "full",
        vfs: str | None = None,
    ) -> None:
        """`durability`: which calls are synced on return (database.py); "full": all of them.

        Without a path the ledger is in memory, for the threads of this process. `vfs`: the SQLite file
        layer, for tests that drop writes. Raises SchemaError for a file that is damaged, or that another
        program or a newer version wrote; ConfigError on a network filesystem.
        """
        super().__init__(path, durability, vfs)
        self.durable = str(path) != IN_MEMORY

    # -- roles -----------------------------------------------------------------------------

    def acquire(self, role: str, holder: str, order: Order | None = None) -> Fence:
        with self._mutation(None, final=True):
            if order is not None and (settled := self._settle_order(order)) != order:
                raise other_order(settled, order)
            epoch = self._next_epoch(role, holder)
            if role == CONSUMER:
                self._begin_consumer()
            else:
                self._end_work_of(Fence(role, epoch).worker)
            return Fence(role, epoch)

    def _next_epoch(self, role: str, holder: str) -> int:
        self._change(
            "INSERT INTO role (name, epoch, holder) VALUES (?, 1, ?) ON CONFLICT (name) DO UPDATE "
            "SET epoch = epoch + 1, holder = excluded.holder, last_op = 0, result = 'null'",
            *(role, holder),
        )
        return int(self._value("SELECT epoch FROM role WHERE name = ?", role))

    def _begin_consumer(self) -> None:
        run = self._run()
        self._undo_provisional_acks()
        self._change("UPDATE plan SET deaths = deaths + 1 WHERE step = ?", run.started_step)
        run.started_step = None
        run.trained_step = self._value("SELECT coalesce(max(step), 0) FROM checkpoint")

    # -- facts -----------------------------------------------------------------------------

    @change(final_if="settle")
    def set_facts(self, facts: Mapping[str, Any], *, settle: bool = False) -> dict[str, Any]:
        known = self.facts() if settle else {}
        standing = {key: known[key] for key in facts if key in known}
        if standing:
            return self._unchanged(standing)
        rows = [(key, json.dumps(value)) for key, value in facts.items()]
        self._db.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?)", rows)
        return {key: json.loads(text) for key, text in rows}

    def facts(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._rows("SELECT key, value FROM fact")}

    # -- the whole -------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        with self._reading():
            run = self._run()
            return Snapshot(
                lsn=run.lsn,
                order=None if run.place_order is None else Order(run.place_order),
                prompts=self._prompt_counts(),
                committed=run.committed,
                settled=self._settled(),
                closed=bool(run.closed),
                usage=self._usage(),
                lost=self._value("SELECT count(*) FROM sample WHERE state = 'lost'"),
                quarantined=self._value("SELECT count(*) FROM sample WHERE state = 'quarantined'"),
                trained_step=run.trained_step,
                checkpoints=tuple(self._checkpoints()),
                epochs=dict(self._rows("SELECT name, epoch FROM role")),
                facts=self.facts(),
                next_generation=run.next_generation,
                archived_place=run.archived_place,
            )

    def _prompt_counts(self) -> PromptCounts:
        run = self._run()
        rows = dict(self._rows("SELECT state, count(*) FROM prompt GROUP BY state"))
        again = self._value("SELECT count(*) FROM prompt WHERE state != 'failed' AND again")
        return PromptCounts(
            pending=rows.get("pending", 0) + max(0, run.num_prompts - run.next_ordinal),
            leased=rows.get("leased", 0),
            done=run.next_ordinal - sum(rows.values()),
            failed=rows.get("failed", 0),
            again=again,
        )
