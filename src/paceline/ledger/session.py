"""The base of producer and consumer sessions: it owns the fence and the operation numbers.

A session is one process's hold on one role. Every change goes through `_change`, which passes the fence
and the next operation number, and repeats the call under the same number while its result is unknown.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from paceline.errors import IllegalTransitionError, LedgerError, UnknownResultError
from paceline.ledger.facts import LEDGER, RUN_ID
from paceline.ledger.ledger import Ledger
from paceline.ledger.records import Fence, Order, Page, SampleRecord, Snapshot
from paceline.ledger.refusals import fenced

TRIES = 3  # of a call whose result stays unknown
T = TypeVar("T")


class Session:
    def __init__(self, ledger: Ledger, run_id: str, role: str, order: Order | None = None) -> None:
        """Before `acquire` a session can only read. Raises LedgerError for another run's ledger."""
        self.ledger = ledger
        self.run_id = run_id
        self.role = role
        self._order = order
        self._fence: Fence | None = None
        self._last_op = 0
        bind_run_id(ledger, run_id)

    def acquire(self) -> int:
        """Take the role over from every earlier session; returns the epoch."""
        holder = f"{socket.gethostname()}:{os.getpid()}"
        self._fence, self._last_op = self.ledger.acquire(self.role, holder, self._order), 0
        return self._fence.epoch

    @property
    def fence(self) -> Fence:
        if self._fence is None:
            raise IllegalTransitionError(
                f"This session has not acquired the role {self.role}.",
                why="Only the holder of a role may change the ledger.",
                next="call acquire() first.",
            )
        return self._fence

    @property
    def epoch(self) -> int:
        return self.fence.epoch

    def _change(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Make a change under the next operation number, and repeat it while its result is unknown."""
        self._last_op += 1
        return repeated(call, self.fence.call(self._last_op), *args, **kwargs)

    def refuse_if_replaced(self) -> None:
        """Raise FencedError if another process holds the role. Call it before waiting or touching files."""
        current = self.ledger.snapshot().epochs[self.role]
        if current != self.epoch:
            raise fenced(self.fence, current)

    # -- facts -----------------------------------------------------------------------------

    def set_facts(self, facts: Mapping[str, Any]) -> None:
        self._change(self.ledger.set_facts, facts)

    def settle_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write these facts durably, unless one of them has a value; returns the values that stand."""
        return self._change(self.ledger.set_facts, facts, settle=True)

    def facts(self) -> dict[str, Any]:
        return self.ledger.facts()

    @cached_property
    def identities(self) -> list[str]:
        """Which ledger this is, and which ones it replaced; [] of one that no run's opener has seen."""
        found = self.facts().get(LEDGER)
        return [] if found is None else [found["identity"], *found["replaces"]]

    # -- reading ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return self.ledger.snapshot()

    def read(self, start: int, stop: int) -> Page:
        return self.ledger.read(start, stop)

    def find(self, sample_ids: Sequence[str]) -> dict[str, SampleRecord]:
        return self.ledger.find(sample_ids)

    def lsn(self) -> int:
        return self.ledger.lsn()

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        return self.ledger.wait(seen_lsn, timeout_s)

    def report_lost(self, sample_ids: Sequence[str]) -> None:
        """The features are gone or damaged: have them captured again, unless durable weights contain them."""
        self._change(self.ledger.report_lost, list(sample_ids))


def repeated(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The call's result; it is made again while that is unknown."""
    for _ in range(TRIES - 1):
        try:
            return call(*args, **kwargs)
        except UnknownResultError:
            continue
    return call(*args, **kwargs)


def write_facts(ledger: Ledger, facts: Mapping[str, Any]) -> None:
    """Write facts without a role, again while the result is unknown: written twice they are the same values.

    For a start that has no role yet: what binds the run, where its features lie, whom it replaces.
    """
    repeated(ledger.set_facts, None, facts)


def bind_run_id(ledger: Ledger, run_id: str) -> None:
    """Record whose ledger this is. Raises LedgerError if it belongs to another run."""
    owner = ledger.facts().get(RUN_ID)
    if owner is None:  # another process may settle it at the same moment
        owner = ledger.set_facts(None, {RUN_ID: run_id}, settle=True)[RUN_ID]
    if owner != run_id:
        raise LedgerError(
            f"This ledger belongs to run {owner!r}, not to {run_id!r}.",
            why="Mixing two runs would train samples into the wrong weights.",
            next=f"open it as {owner!r}, or give the new run its own ledger.",
        )
