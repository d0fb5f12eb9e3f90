"""The producers of one run, as one of them sees the others: which live, what they hold, which it gives up.

A producer says in a fact of the ledger, a few times per time-out, that it lives and which groups it holds.
An observer counts time by its own monotonic clock only: a producer whose fact has not changed for the
time-out is taken for dead, and its role is taken over, so that its leases return and all that it still does
is refused. Safety is the epoch's alone; a time-out that is too short costs work, never samples.

Two rules keep a slow producer from holding up the others. No producer leases a group that is further from the
settled prefix than the budget can hold (`bound`), so that those that run ahead never take the room of the
group that all others wait for. And a group that is held many times longer than this producer needs for one,
while it has nothing else to do, is taken from its holder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any

from paceline.errors import FencedError, LedgerError
from paceline.ledger.facts import producers_in
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Snapshot, producer_role

BEATS_PER_TIMEOUT = 5
SLOWER_BY = 8  # than this producer: a group held so much longer is taken from its holder


class Neighbours:
    def __init__(
        self,
        session: ProducerSession,
        *,
        timeout_s: float,
        group_size: int,
        groups_ahead: int,
        about: Mapping[str, Any] | None = None,
        in_background: bool = True,
        report: Callable[..., None] = lambda *_, **__: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`timeout_s`: without a sign of life for so long, a producer is taken for dead.

        `groups_ahead`: how many groups the budget can hold beside what the consumer needs, at least 1.
        `about`: what people should know of this producer, such as its host. `in_background`: a thread tells
        that this producer lives; else `look` does, for callers that have a clock of their own.
        """
        self._session = session
        self._timeout_s = timeout_s
        self._group_size = group_size
        self._groups_ahead = groups_ahead
        self._about = dict(about or {})
        self._in_background = in_background
        self._report = report
        self._clock = clock
        self._seen: dict[str, tuple[object, float]] = {}  # of each worker: what it said last, and since when
        self._watched_at = self._looked_at = 0.0
        self._watching = Lock()
        self._prefix: tuple[object, float] = (None, 0.0)  # which group all others wait for, and since when
        self._stolen: set[int] = set()  # groups that this producer took from others, each once
        self._longest_s = 0.0
        self._telling = Lock()
        self._beat, self._due = 0, 0.0
        self._held: dict[int, float] = {}  # first ordinals of groups, and when each was leased
        self._num_aside = 0
        self._end: Event | None = None

    # -- what this producer says ---------------------------------------------------------------

    def begin(self) -> None:
        """Say that this producer lives, before it leases anything; call it after the role was taken."""
        self._tell()
        if self._in_background:
            end = self._end = Event()
            Thread(target=self._tell_until, args=(end,), name="paceline-heartbeat", daemon=True).start()

    def end(self) -> None:
        """Leave: in good order if every lease was given back, else in silence: the others take it over.

        No other process would return what an error has left, if this producer is not started again.
        """
        if self._end is not None:
            self._end.set()
        with self._telling, suppress(LedgerError):  # an error that ended the run is reported instead
            if not self._session.leased:
                self._session.tell(None)

    def holds(self, ordinals: Sequence[int], num_aside: int = 0) -> None:
        """The groups, by their first ordinals, that this producer holds now.

        `num_aside`: prompts that it keeps leased, and neither captures nor fails until something is captured.
        """
        now, held = self._clock(), self._held
        for first in held.keys() - set(ordinals):
            self._longest_s = max(self._longest_s, now - held[first])
        self._held = {first: held.get(first, now) for first in ordinals}
        if num_aside != self._num_aside:
            self._num_aside = num_aside
            self._tell()

    def _tell_until(self, end: Event) -> None:
        while not end.wait(self._timeout_s / BEATS_PER_TIMEOUT):
            try:
                self._tell(end)
                self._silent(self._session.snapshot())
            except FencedError:
                return
            except LedgerError:
                continue  # the producer meets it, too, if it stays

    def _tell(self, end: Event | None = None) -> None:
        with self._telling:
            if end is not None and end.is_set():
                return
            now, self._beat = self._clock(), self._beat + 1
            self._due = now + self._timeout_s / BEATS_PER_TIMEOUT
            held = [[first, round(now - since, 1)] for first, since in sorted(self._held.items())]
            self._session.tell({**self._about, "beat": self._beat, "holds": held, "aside": self._num_aside})

    # -- what it sees of the others ------------------------------------------------------------

    def look(self, *, is_idle: bool) -> None:
        """Take over the work of producers that were not heard of for the time-out.

        Only an observer that watched all the time knows that; the thread that tells of this producer watches
        while it captures. One that could not reach the ledger begins anew: the others may not have reached
        it either.

        `is_idle`: this producer holds nothing and finds nothing to lease, so it may also take a group that is
        much older than its own ones were, if it had any.
        """
        if not self._in_background and self._clock() >= self._due:
            self._tell()
        now = self._session.snapshot()
        if self._clock() - self._looked_at > self._timeout_s / 2:
            self._prefix = None, 0.0
        self._looked_at = self._clock()
        silent = self._silent(now)
        if silent is not None:
            self._take_from(silent, f"it was not heard of for {self._timeout_s:g} s")
        elif is_idle:
            self._look_at_prefix(now)

    def _silent(self, now: Snapshot) -> str | None:
        """A producer that was not heard of for the time-out; None if there is none."""
        with self._watching:
            if self._clock() - self._watched_at > self._timeout_s / 2:
                self._seen = {}
            self._watched_at = self._clock()
            silent = [
                worker
                for worker, told in self._others(now).items()
                if self._unchanged_s(worker, (now.epochs.get(producer_role(worker)), told)) >= self._timeout_s
            ]
        return next(iter(silent), None)

    def _unchanged_s(self, worker: str, told: object) -> float:
        if worker not in self._seen or self._seen[worker][0] != told:
            self._seen[worker] = told, self._clock()
        return self._clock() - self._seen[worker][1]

    def _look_at_prefix(self, now: Snapshot) -> None:
        holder = next(
            (
                (worker, now.epochs.get(producer_role(worker)), first)
                for worker, told in self._others(now).items()
                for first, _ in told.get("holds", ())
                if first <= now.settled < first + self._group_size
            ),
            None,
        )
        if holder is None or holder != self._prefix[0]:
            self._prefix = holder, self._clock()
            return
        worker, _, first = holder
        patience_s = max(self._timeout_s, SLOWER_BY * self._longest_s)
        if self._longest_s and first not in self._stolen and self._clock() - self._prefix[1] >= patience_s:
            self._stolen.add(first)
            self._take_from(worker, f"group {first // self._group_size} is held for over {patience_s:g} s")

    def _take_from(self, worker: str, why: str) -> None:
        self._session.take_from(worker)
        with self._watching:
            self._seen.pop(worker, None)
        self._report("taken_over", worker=worker, message=why)

    def _others(self, now: Snapshot) -> dict[str, dict[str, Any]]:
        return {w: told for w, told in producers_in(now.facts).items() if w != self._session.worker}

    def num_aside(self) -> int:
        """How many prompts the other producers keep aside (see `holds`)."""
        return sum(int(told.get("aside", 0)) for told in self._others(self._session.snapshot()).values())

    def bound(self) -> int | None:
        """Prompts from this ordinal on are not to be leased now; None: there is no bound.

        The settled prefix only grows, so a bound stays right however late it is used. The holder of the
        prefix has none: its groups have room, and none waits for another's. A producer that keeps prompts
        aside has none either: only a later group can show whether these are to blame, and theirs was room
        for one.
        """
        now = self._session.snapshot()
        if (
            self._num_aside
            or min(self._held, default=now.settled + 1) <= now.settled
            or not self._others(now)
        ):
            return None
        return (now.settled // self._group_size + self._groups_ahead) * self._group_size
