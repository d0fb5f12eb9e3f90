"""Samples: their intents, commits, acks and features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from paceline.ledger.records import (
    Budget,
    Entry,
    Ownership,
    Page,
    SampleRecord,
    State,
    Usage,
    Wanted,
    bare_ref,
    compacted,
)
from paceline.ledger.refusals import intent_revoked, not_covered, other_place
from paceline.ledger.stores.sqlite.archive import Archive
from paceline.ledger.stores.sqlite.database import change
from paceline.ledger.stores.sqlite.text import AMONG, json_list
from paceline.types import SampleRef, ref_from_json, ref_to_json

HEAD = "(SELECT coalesce(max(step), -1) FROM checkpoint)"
COVERED = f"iif(state = 'quarantined', step IS NULL OR step <= {HEAD}, acked = 2)"
RECORD = "sample_id, place, state, ref, step, acked, reason, resident"


def record_of(row: tuple[Any, ...]) -> SampleRecord:
    sample_id, place, state, ref, step, acked, reason, resident = row
    return SampleRecord(
        sample_id, place, State(state), ref_from_json(ref), step, acked == 2, reason, bool(resident)
    )


class SampleTable(Archive):
    # -- intents ---------------------------------------------------------------------------

    @change()
    def reserve(self, wanted: Sequence[Wanted], budget: Budget | None) -> list[int] | None:
        num_bytes = sum(sample.num_bytes for sample in wanted)
        if budget is not None and not self._usage().has_room(budget, len(wanted), num_bytes):
            return self._unchanged(None)
        first = self._run().next_generation
        self._run().next_generation += len(wanted)
        generations = list(range(first, first + len(wanted)))
        self._db.executemany(
            "INSERT INTO intent (generation, sample_id, bytes, ordinal, worker) VALUES (?, ?, ?, ?, ?)",
            [
                (generation, sample.sample_id, sample.num_bytes, sample.ordinal, self._worker)
                for generation, sample in zip(generations, wanted, strict=True)
            ],
        )
        return generations

    @change()
    def swept(self, generations: Sequence[int], skip_through: int = 0) -> None:
        self._change(
            f"DELETE FROM intent WHERE (revoked OR worker = ?) AND generation {AMONG}",  # noqa: S608 (ours)
            *(self._worker or None, json_list(generations)),
        )
        run = self._run()
        run.next_generation = max(run.next_generation, skip_through + 1)

    # -- commits ---------------------------------------------------------------------------

    @change()
    def commit(self, refs: Sequence[SampleRef]) -> list[bool]:
        texts = [ref_to_json(ref) for ref in refs]
        if not refs:
            return self._unchanged([])
        self._settle_order("arrival")  # unless a producer settled it before
        gone = [ref.sample_id for ref in refs if not self._may_commit(ref)]
        if gone:
            raise intent_revoked(gone)
        return [self._commit_ref(ref, text) for ref, text in zip(refs, texts, strict=True)]

    def _settle_order(self, order: str) -> str:
        run = self._run()
        run.place_order = run.place_order or order
        return run.place_order

    def _may_commit(self, ref: SampleRef) -> bool:
        """Whether the ref has an intent, or is on record already."""
        if ref.generation == 0 and self._run().place_order == "arrival":
            return True
        found = self._value(
            "SELECT 1 FROM intent WHERE generation = ?1 AND sample_id = ?2 AND worker = ?3 AND NOT revoked "
            "UNION SELECT 1 FROM sample WHERE sample_id = ?2 AND (generation = ?1 OR state = 'released')",
            *(ref.generation, ref.sample_id, self._worker),
        )
        return found is not None or self._is_archived(ref)

    def _commit_ref(self, ref: SampleRef, text: str) -> bool:
        self._change("DELETE FROM intent WHERE generation = ? AND NOT revoked", ref.generation)
        known = self._rows(
            "SELECT place, ordinal, state, generation, acked FROM sample WHERE sample_id = ?", ref.sample_id
        )
        if known:
            return self._commit_known(ref, text, *known[0])
        if self._is_archived(ref) or self._is_hole(ref):
            return False
        run, ordinal = self._run(), ref.ordinal
        place = run.committed if run.place_order == "arrival" else ordinal
        if ordinal is not None and ordinal >= run.num_prompts:
            raise other_place(ref.sample_id, ordinal, f"the run has {run.num_prompts} prompts")
        if place is None:
            raise other_place(
                ref.sample_id, ordinal, "it does not name its prompt, whose ordinal is its place"
            )
        there = self._value("SELECT sample_id FROM sample WHERE place = ?", place)
        if there is not None:
            raise other_place(ref.sample_id, ordinal, f"{there} is there")
        self._finish_prompt(ordinal)
        self._change(
            "INSERT INTO sample (place, sample_id, ordinal, bytes, generation, ref) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            *(place, ref.sample_id, ordinal, ref.estimated_bytes, ref.generation, text),
        )
        run.committed += 1
        return True

    def _commit_known(
        self,
        ref: SampleRef,
        text: str,
        place: int,
        ordinal: int | None,
        state: str,
        generation: int,
        acked: int,
    ) -> bool:
        if self._run().place_order == "ordinal" and ref.ordinal != ordinal:
            raise other_place(ref.sample_id, ref.ordinal, f"it is there for prompt {ordinal}")
        if state == "lost" and generation == ref.generation != 0:
            return False  # these are the lost bytes themselves
        self._finish_prompt(ordinal)
        if state != "lost":
            return False
        if acked == 2:  # by now durable weights contain it
            self._change("UPDATE sample SET state = 'released' WHERE place = ?", place)
            return False
        self._change(
            "UPDATE sample SET state = 'present', resident = 1, bytes = ?, generation = ?, ref = ? "
            "WHERE place = ?",
            *(ref.estimated_bytes, ref.generation, text, place),
        )
        return True

    def _is_hole(self, ref: SampleRef) -> bool:
        """Whether its prompt failed; readers may have passed its place."""
        return (
            self._run().place_order == "ordinal"
            and self._value("SELECT 1 FROM prompt WHERE ordinal = ? AND state = 'failed'", ref.ordinal)
            is not None
        )

    # -- reading ---------------------------------------------------------------------------

    def read(self, start: int, stop: int) -> Page:
        with self._reading():
            settled = self._settled()
            rows = self._rows(
                "SELECT place, ref, state FROM sample WHERE place >= ? AND place < ? ORDER BY place",
                *(start, min(stop, settled)),
            )
            closed = bool(self._run().closed)
        entries = (Entry(place, ref_from_json(ref), State(state)) for place, ref, state in rows)
        return Page(tuple(entries), settled, closed)

    def find(
        self,
        sample_ids: Sequence[str] | None = None,
        *,
        state: State | None = None,
        limit: int | None = None,
    ) -> dict[str, SampleRecord]:
        where, values = ["true"], list[Any]()
        if sample_ids is not None:
            where.append(f"sample_id {AMONG}")
            values.append(json_list(sample_ids))
        if state is not None:
            where.append(f"state = '{State(state)}'")  # a constant, so that its partial index is used
        rows = self._rows(
            f"SELECT {RECORD} FROM sample WHERE {' AND '.join(where)} ORDER BY place LIMIT ?",  # noqa: S608
            *(*values, -1 if limit is None else limit),
        )
        return {row[0]: record_of(row) for row in rows}

    def ownership(self) -> Ownership:
        with self._reading():
            present = self._rows("SELECT sample_id, generation FROM sample WHERE resident ORDER BY place")
            intents = "SELECT generation, sample_id FROM intent WHERE {} ORDER BY generation"
            promised, revoked = (self._rows(intents.format(which)) for which in ("NOT revoked", "revoked"))
            return Ownership(dict(present), dict(promised), dict(revoked), self._run().next_generation)

    def _usage(self) -> Usage:
        [(count, size, provisional, waiting)] = self._rows(
            "SELECT count(*), coalesce(sum(bytes), 0), coalesce(sum(acked = 1), 0), "
            "coalesce(sum(acked = 0 AND state = 'present'), 0) FROM sample WHERE resident"
        )
        lost = self._value("SELECT count(*) FROM sample WHERE state = 'lost' AND acked = 0")
        [(promised, promised_size)] = self._rows("SELECT count(*), coalesce(sum(bytes), 0) FROM intent")
        return Usage(count, size, provisional, waiting + lost, promised, promised_size)

    # -- features --------------------------------------------------------------------------

    @change()
    def release(self, freed: Sequence[str], limit: int) -> dict[str, int]:
        if freed:
            self._record_freed(freed)
        covered = self._rows(
            f"SELECT sample_id, generation FROM sample WHERE resident AND {COVERED} "  # noqa: S608 (ours)
            "ORDER BY place LIMIT ?",
            limit,
        )
        return dict(covered) if freed else self._unchanged(dict(covered))

    def _record_freed(self, sample_ids: Sequence[str]) -> None:
        rows = self._rows(
            f"SELECT sample_id, {COVERED}, iif(state = 'quarantined', ref, NULL) "  # noqa: S608 (ours)
            f"FROM sample WHERE sample_id {AMONG}",
            json_list(sample_ids),
        )
        covered = {sample_id: is_covered for sample_id, is_covered, _ in rows}
        archived = self._archived_among([i for i in sample_ids if i not in covered])
        early = [i for i in sample_ids if not covered.get(i, i in archived)]
        if early:
            raise not_covered(early)
        self._change(
            "UPDATE sample SET resident = 0, "  # noqa: S608 (ours)
            f"state = iif(state = 'present', 'released', state) WHERE sample_id {AMONG}",
            json_list(sample_ids),
        )
        for sample_id, _, ref in rows:
            if ref is not None:  # only the id is needed from now on
                text = ref_to_json(compacted(ref_from_json(ref)))
                self._change("UPDATE sample SET ref = ? WHERE sample_id = ?", text, sample_id)

    @change()
    def report_lost(self, sample_ids: Sequence[str]) -> None:
        rows = self._rows(
            f"SELECT sample_id FROM sample WHERE acked < 2 AND sample_id {AMONG}",  # noqa: S608 (ours)
            json_list(sample_ids),
        )
        self._lose(sample_id for (sample_id,) in rows)

    def _lose(self, sample_ids: Iterable[str]) -> None:
        for sample_id in sample_ids:
            [(state, ordinal)] = self._rows(
                "UPDATE sample SET resident = 0, state = iif(state = 'quarantined', state, 'lost') "
                "WHERE sample_id = ? RETURNING state, ordinal",
                sample_id,
            )
            if state == "lost":
                self._reopen_prompt(ordinal)

    def _enter_forgotten(self, place: int, sample_id: str, ordinal: int | None) -> None:
        """Enter a sample that a checkpoint's lineage knows and this ledger does not."""
        self._change(
            "INSERT INTO sample (place, sample_id, ordinal, state, resident, ref) "
            "VALUES (?, ?, ?, 'lost', 0, ?)",
            *(place, sample_id, ordinal, ref_to_json(bare_ref(sample_id, ordinal))),
        )
        self._run().committed += 1
