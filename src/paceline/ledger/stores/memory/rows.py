"""The rows of the in-memory store and its transactions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from paceline.ledger.records import (
    CheckpointRecord,
    Fence,
    Intent,
    StepPlan,
)
from paceline.ledger.refusals import (
    fenced,
)
from paceline.types import SampleRef

OPS_KEPT = 4096


@dataclass
class SampleRow:
    seq: int
    ref: SampleRef
    state: str = "present"  # present | lost | released | quarantined
    resident: bool = True  # the feature store should hold its bytes
    reason: str = ""
    quarantine_step: int | None = None


@dataclass
class AckRow:
    step: int | None
    durable: bool


@dataclass
class TaskRow:
    ordinal: int
    state: str = "pending"  # pending | leased | done | failed
    holder: str = ""
    attempt: int = 0
    deaths: int = 0
    reason: str = ""


class Operation:
    """One call with an op id: what its first try returned, if there was one."""

    def __init__(self, results: dict[str, Any], op_id: str | None) -> None:
        self._results = results
        self._op_id = op_id
        self.repeated = op_id is not None and op_id in results

    @property
    def result(self) -> Any:
        return self._results[self._op_id or ""]

    def keep(self, result: Any) -> Any:
        if self._op_id is not None:
            self._results[self._op_id] = result
            if len(self._results) > OPS_KEPT:
                del self._results[next(iter(self._results))]
        return result


class Rows:
    """All of the store's state, and what a transaction on it is."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._lsn = 0
        self._next_generation = 1
        self._samples: dict[str, SampleRow] = {}
        self._acks: dict[str, AckRow] = {}
        self._tasks: dict[str, TaskRow] = {}
        self._roles: dict[str, int] = {}
        self._intents: dict[int, Intent] = {}
        self._plans: dict[int, StepPlan] = {}
        self._deaths: dict[int, int] = {}
        self._started_step: int | None = None
        self._trained_step = 0
        self._folded_step = 0
        self._checkpoints: dict[int, CheckpointRecord] = {}
        self._facts: dict[str, str] = {}
        self._ops: dict[str, Any] = {}

    @contextmanager
    def _mutation(self, fence: Fence | None, op_id: str | None = None) -> Iterator[Operation]:
        with self._changed:
            operation = Operation(self._ops, op_id)
            if operation.repeated:
                yield operation
                return
            self._check_fence(fence)
            yield operation
            self._lsn += 1
            self._changed.notify_all()

    def _check_fence(self, fence: Fence | None) -> None:
        if fence is not None and self._roles.get(fence.role) != fence.epoch:
            raise fenced(fence, self._roles.get(fence.role, 0))
