"""The metadata store in plain dictionaries: the readable specification, and the private store.

One lock, no durability: it serves threads of one process and dies with it. Every other store
must behave like this one; the conformance suite and the differential state machine say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from paceline.ledger.records import (
    Fence,
)
from paceline.ledger.store import MetadataStore
from paceline.ledger.stores.memory.steps import Steps


class InMemoryMetadataStore(Steps, MetadataStore):
    durable = False

    # -- roles -----------------------------------------------------------------------------

    def acquire_role(self, role: str, holder: str) -> Fence:  # noqa: ARG002 (for the record)
        with self._mutation(None):
            self._roles[role] = self._roles.get(role, 0) + 1
            if role == "producer":
                self._intents.clear()
                for task in self._tasks.values():
                    if task.state == "leased":
                        task.state, task.holder, task.deaths = "pending", "", task.deaths + 1
            if role == "consumer":
                self._acks = {i: ack for i, ack in self._acks.items() if ack.durable}
                self._trained_step = max(self._checkpoints, default=0)
                if self._started_step is not None:
                    self._deaths[self._started_step] = self._deaths.get(self._started_step, 0) + 1
                    self._started_step = None
            return Fence(role, self._roles[role], self._next_generation)

    def role_epochs(self) -> dict[str, int]:
        with self._changed:
            return dict(self._roles)

    # -- run -------------------------------------------------------------------------------

    def set_facts(self, facts: Mapping[str, Any], *, fence: Fence | None = None) -> None:
        encoded = {key: json.dumps(value) for key, value in facts.items()}
        with self._mutation(fence):
            self._facts.update(encoded)

    def settle_facts(self, facts: Mapping[str, Any], *, fence: Fence | None = None) -> dict[str, Any]:
        with self._mutation(fence):
            if not any(key in self._facts for key in facts):
                self._facts.update({key: json.dumps(value) for key, value in facts.items()})
            return {key: json.loads(self._facts[key]) for key in facts if key in self._facts}

    def facts(self) -> dict[str, Any]:
        with self._changed:
            return {key: json.loads(value) for key, value in self._facts.items()}

    def lsn(self) -> int:
        with self._changed:
            return self._lsn

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._lsn != seen_lsn, timeout_s)
            return self._lsn

    def close(self) -> None:
        """Nothing to give back; the contents stay readable until the object dies."""
