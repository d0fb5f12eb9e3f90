"""Questions to the ledger. Each is answered from one state of it; long answers come in pages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from paceline.ledger.records import (
    CheckpointRecord,
    Entry,
    Order,
    Ownership,
    Page,
    PromptCounts,
    SampleRecord,
    Snapshot,
    SourceBlock,
    State,
    TrainedSample,
    TrainedStep,
    Usage,
    compacted,
)
from paceline.ledger.stores.redis.calls import Calls
from paceline.types import SampleRef, ref_from_json

PAGE = 2000  # samples asked for by id in one call
END = 1 << 52  # no step and no place is as large


def _ref(text: str, is_bare: bool) -> SampleRef:
    ref = ref_from_json(text)
    return compacted(ref) if is_bare else ref


def _record(row: list[Any]) -> SampleRecord:
    place, sample_id, state, text, step, acked, reason, resident, is_bare = row
    return SampleRecord(
        sample_id, place, State(state), _ref(text, is_bare), step, acked == 2, reason, resident
    )


def _visit(place: int, sample_id: str, ordinal: int | Literal[False], finished: bool) -> TrainedSample:
    return TrainedSample(place, sample_id, None if ordinal is False else ordinal, finished)


class Reading(Calls):
    def lsn(self) -> int:
        return int(self._ask("lsn"))

    def facts(self) -> dict[str, Any]:
        return {key: json.loads(text) for key, text in self._ask("facts")}

    def snapshot(self) -> Snapshot:
        run, counts, checkpoints, epochs, facts = self._ask("snapshot")
        num_rows = counts["pending"] + counts["leased"] + counts["failed"]
        return Snapshot(
            lsn=run["lsn"],
            order=Order(run["place_order"]) if "place_order" in run else None,
            prompts=PromptCounts(
                pending=counts["pending"] + max(0, run["num_prompts"] - run["next_ordinal"]),
                leased=counts["leased"],
                done=run["next_ordinal"] - num_rows,
                failed=counts["failed"],
                again=counts["again"],
            ),
            committed=run["committed"],
            settled=counts["settled"],
            closed=bool(run["closed"]),
            usage=Usage(
                run["resident_samples"],
                run["resident_bytes"],
                run["provisional_samples"],
                run["waiting_samples"],
                counts["reserved"],
                run["reserved_bytes"],
            ),
            lost=counts["lost"],
            quarantined=counts["quarantined"],
            trained_step=run["trained_step"],
            checkpoints=tuple(CheckpointRecord(*row) for row in checkpoints),
            epochs={role: int(epoch) for role, epoch in epochs},
            facts={key: json.loads(text) for key, text in facts},
            next_generation=run["next_generation"],
            archived_place=run["archived_place"],
        )

    def source_blocks(self, first: int = 0, limit: int | None = None) -> list[SourceBlock]:
        return [SourceBlock(*block) for block in self._ask("source_blocks", first, limit)]

    def read(self, start: int, stop: int) -> Page:
        """As far as the log was settled when the first page of it was read."""
        rows, settled, closed, following = self._ask("read", start, stop)
        while following is not None:
            more, _, _, following = self._ask("read", following, min(stop, settled))
            rows += more
        entries = (Entry(row[0], _ref(row[3], row[8]), State(row[2])) for row in rows)
        return Page(tuple(entries), settled, closed)

    def find(
        self,
        sample_ids: Sequence[str] | None = None,
        *,
        state: State | None = None,
        limit: int | None = None,
    ) -> dict[str, SampleRecord]:
        wanted = None if state is None else State(state).value
        if sample_ids is None:
            rows = self._found(wanted, limit)
        else:
            ids = list(dict.fromkeys(sample_ids))
            pages = (ids[at : at + PAGE] for at in range(0, len(ids), PAGE))
            rows = sorted(row for page in pages for row in self._ask("find_among", page, wanted))
        return {row[1]: _record(row) for row in rows[:limit]}

    def _found(self, state: str | None, limit: int | None) -> list[list[Any]]:
        rows: list[list[Any]] = []
        start: int | None = 0
        while start is not None and (limit is None or len(rows) < limit):
            page, start = self._ask("find", state, start, limit)
            rows += page
        return rows

    def failed(self, start: int = 0, stop: int | None = None) -> dict[int, str]:
        found: dict[int, str] = {}
        while page := self._ask("failed", start, stop):
            found.update(page)
            start = page[-1][0] + 1
        return found

    def ownership(self) -> Ownership:
        present, promised, revoked, next_generation = self._ask("ownership")
        return Ownership(dict(present), dict(promised), dict(revoked), next_generation)

    def history(self, *, step: int | None = None, sample_id: str | None = None) -> Iterator[TrainedStep]:
        after: int | None = -1 if step is None else step - 1
        while after is not None:
            rows, after = self._ask("history", after, END if step is None else step, sample_id)
            for number, rev, samples in rows:
                names = sample_id is None or any(visit[1] == sample_id for visit in samples)
                if names and step in (None, number):
                    yield TrainedStep(number, rev, tuple(_visit(*visit) for visit in samples))
