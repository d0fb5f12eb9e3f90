"""SQLiteMetadataStore and InMemoryMetadataStore: the earlier API over a ledger.

Each is a `Ledger`, so the builders of paceline.roles.wire accept it. One on a server: redis_store.py.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from paceline.ledger.ledger import Ledger
from paceline.ledger.records import Entry, Fence, State
from paceline.ledger.stores.sqlite import IN_MEMORY, Durability, SQLiteLedger
from paceline.ledger.stores.sqlite.text import AMONG, json_list
from paceline.types import SampleRef

EVERYTHING = 1 << 62
T = TypeVar("T")


class MetadataStore(Ledger):
    """The operations that all stores share, with or without a role's fence."""

    @abstractmethod
    def record_ack(
        self, fence: Fence | None, /, sample_ids: Sequence[str], step: int | None, *, durable: bool
    ) -> None:
        """Ack the samples that are not acked durably yet; one that is `durable` is synced."""

    @abstractmethod
    def acked(self, *, durable: bool) -> list[tuple[str, int | None]]:
        """The ids that are acked so and not archived, each with its step."""

    # -- samples ---------------------------------------------------------------------------

    def commit_sample(self, ref: SampleRef, *, fence: Fence | None = None) -> bool:
        """Commit one ref; True if it is new, False if its id was committed before."""
        return self.commit_samples([ref], fence=fence)[0]

    def commit_samples(self, refs: Sequence[SampleRef], *, fence: Fence | None = None) -> list[bool]:
        """Commit all refs in one transaction, idempotent on `sample_id`; freshness of each."""
        return self.commit(fence, refs)

    def is_committed(self, sample_id: str) -> bool:
        return bool(self.find([sample_id])) or any(
            sample.finished and sample.sample_id == sample_id
            for trained in self.history(sample_id=sample_id)
            for sample in trained.samples
        )

    def get_committed(self, sample_id: str) -> SampleRef | None:
        record = self.find([sample_id]).get(sample_id)
        return None if record is None else record.ref

    def committed_count(self) -> int:
        return self.snapshot().committed

    def all_committed_ids(self) -> list[str]:
        """Every committed id of the run, in commit order."""

        def ids() -> list[str]:
            places = {s.place: s.sample_id for t in self.history() for s in t.samples if s.place >= 0}
            places.update((record.place, sample_id) for sample_id, record in self.find().items())
            return [places[place] for place in sorted(places)]

        return self._of_one_moment(ids)

    def read_committed(self, start: int, limit: int = EVERYTHING) -> tuple[Entry, ...]:
        """The log from place `start` on."""
        return self.read(start, min(start + limit, EVERYTHING)).entries

    # -- acks ------------------------------------------------------------------------------

    def record_train_ack(
        self,
        sample_ids: Sequence[str],
        *,
        global_step: int | None,
        optimizer_durable: bool,
        fence: Fence | None = None,
    ) -> None:
        """Record that an optimizer step used the samples. All or nothing, idempotent.

        `optimizer_durable`: a durable checkpoint covers the step. It applies only to the named ids,
        and a later ack never revokes it.
        """
        if not all(isinstance(sample_id, str) for sample_id in sample_ids):
            raise TypeError("sample ids are strings")
        self.record_ack(fence, sample_ids, global_step, durable=optimizer_durable)

    def durable_marker(self) -> dict[str, Any]:
        """{"acked": set of ids, "global_step": int | None, "optimizer_durable": bool}.

        While any ack is durable: the durably acked ids, the highest step among them, True.
        Before that: the provisionally acked ids, their highest step, False. So "acked and
        optimizer_durable" is true of exactly the ids that are safe to release.
        """
        rows, durable = self._of_one_moment(self._acked_most)
        return {
            "acked": {sample_id for sample_id, _ in rows},
            "global_step": max((step for _, step in rows if step is not None), default=None),
            "optimizer_durable": durable,
        }

    def _acked_most(self) -> tuple[list[tuple[str, int | None]], bool]:
        """The durable acks, or without any the provisional ones; and which it is."""
        finished = {s.sample_id: t.step for t in self.history() for s in t.samples if s.finished}
        known = self.find(list(finished))
        rows = self.acked(durable=True)
        rows += [(sample_id, step) for sample_id, step in finished.items() if sample_id not in known]
        return (rows, True) if rows else (self.acked(durable=False), False)

    def _of_one_moment(self, question: Callable[[], T]) -> T:
        """The answer that several readings give when nothing changes between them."""
        while True:
            before = self.lsn()
            answer = question()
            if self.lsn() == before:
                return answer

    def record_released(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        """Record that features were freed. Raises IllegalTransitionError unless all were durably acked."""
        self.release(fence, sample_ids, 0)

    # -- samples by state --------------------------------------------------------------------

    def present_ids(self) -> list[str]:
        """Samples whose features the feature store should hold, in commit order."""
        return list(self.ownership().present)

    def lost_ids(self) -> list[str]:
        return [record.sample_id for record in self.find(state=State.LOST).values()]

    def quarantined(self) -> dict[str, str]:
        return {record.sample_id: record.reason for record in self.find(state=State.QUARANTINED).values()}

    # -- prompts by name ---------------------------------------------------------------------

    def task_ids(self) -> list[str]:
        """The ids of the prompts that a controller registered, in order."""
        return list(self.facts().get(TASK_IDS, []))

    def failed_tasks(self) -> dict[str, str]:
        """The failed task ids, each with its reason."""
        ids = self.task_ids()
        return {ids[ordinal]: reason for ordinal, reason in self.failed().items()}


TASK_IDS = "compat.task_ids"


class InSQLite(MetadataStore, SQLiteLedger):
    def record_ack(
        self, fence: Fence | None, /, sample_ids: Sequence[str], step: int | None, *, durable: bool
    ) -> None:
        with self._mutation(fence, final=durable):
            self._change(
                f"UPDATE sample SET acked = ?, step = ? WHERE acked < 2 AND sample_id {AMONG}",  # noqa: S608
                *(2 if durable else 1, step, json_list(sample_ids)),
            )

    def acked(self, *, durable: bool) -> list[tuple[str, int | None]]:
        with self._reading():
            self._refuse_broken()  # the caller may free the samples that are durable
            return self._rows("SELECT sample_id, step FROM sample WHERE acked = ?", 2 if durable else 1)


class SQLiteMetadataStore(InSQLite):
    """A store in one SQLite file, shared by every process that opens it."""

    def __init__(
        self, path: str | os.PathLike[str], *, durability: Durability = "full", vfs: str | None = None
    ) -> None:
        super().__init__(path, durability=durability, vfs=vfs)


class InMemoryMetadataStore(InSQLite):
    """A store for the threads of one process, which ends with the process."""

    durable = False

    def __init__(self) -> None:
        super().__init__(IN_MEMORY)


def ordinals_of(store: MetadataStore, task_ids: Iterable[str | None]) -> list[int | None]:
    """The ordinal of each prompt, its place in the order of registration; None if it is not registered."""
    known = {task_id: ordinal for ordinal, task_id in enumerate(store.task_ids())}
    return [None if task_id is None else known.get(task_id) for task_id in task_ids]
