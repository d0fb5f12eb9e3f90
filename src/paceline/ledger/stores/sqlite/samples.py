"""Samples, their byte intents, acks and features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from paceline.ledger.records import CommittedRef, Fence, Intent, LedgerUsage, SampleRecord, compacted
from paceline.ledger.refusals import intent_revoked, not_covered
from paceline.ledger.stores.sqlite.folding import folded_ref
from paceline.ledger.stores.sqlite.tasks import TaskTable
from paceline.types import SampleRef, ref_from_json, ref_to_json

HEAD = "(SELECT coalesce(max(step), -1) FROM checkpoint)"
AMONG = "IN (SELECT value FROM json_each(?))"
WITHOUT_ACK = "SELECT count(*) FROM sample LEFT JOIN ack USING (sample_id)"
COVERED = (
    "iif(state = 'quarantined', quarantine_step IS NULL OR quarantine_step <= " + HEAD + ", durable = 1)"
)


def json_list(values: Iterable[Any]) -> str:
    """Of ids and numbers. Raises TypeError for any other object."""
    return msgspec.json.encode(list(values), enc_hook=_plain_text).decode()


def _plain_text(value: Any) -> str:
    """Of a subclass of str, numpy's for instance."""
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"a {type(value).__name__} is no id")


class SampleTable(TaskTable):
    # -- byte intents ----------------------------------------------------------------------

    def reserve(
        self, sizes: Mapping[str, int], *, fence: Fence | None = None, op_id: str | None = None
    ) -> dict[str, int]:
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                return dict(operation.result)
            first = self._run().next_generation
            generations = {sample_id: first + n for n, sample_id in enumerate(sizes)}
            self._db.executemany(
                "INSERT INTO intent VALUES (?, ?, ?)",
                [(generations[i], i, num_bytes) for i, num_bytes in sizes.items()],
            )
            self._run().next_generation = first + len(sizes)
            operation.keep(generations)
            return generations

    def revoke(self, generations: Sequence[int], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            self._db.executemany("DELETE FROM intent WHERE generation = ?", [(g,) for g in generations])

    def skip_generations(self, through: int, *, fence: Fence) -> Fence:
        with self._mutation(fence):
            run = self._run()
            run.next_generation = max(run.next_generation, through + 1)
            return replace(fence, generation=run.next_generation)

    def intents(self) -> list[Intent]:
        return [Intent(*row) for row in self._rows("SELECT * FROM intent ORDER BY generation")]

    # -- samples ---------------------------------------------------------------------------

    def commit_samples(
        self, refs: Sequence[SampleRef], *, fence: Fence | None = None, op_id: str | None = None
    ) -> list[bool]:
        texts = [ref_to_json(ref) for ref in refs]
        if not refs:
            return []
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                return list(operation.result)
            if self._commit_new(refs, texts):
                fresh = [True] * len(refs)
            else:
                gone = [ref.sample_id for ref in refs if not self._may_commit(ref)]
                if gone:
                    raise intent_revoked(gone)
                fresh = [self._commit_ref(ref, text) for ref, text in zip(refs, texts, strict=True)]
            operation.keep(fresh)
            return fresh

    def _commit_new(self, refs: Sequence[SampleRef], texts: Sequence[str]) -> bool:
        """Commit in a few statements what a producer commits as a rule: samples that the ledger never
        saw, under their intents, each of a leased prompt of its own (or all of prompts that it does not
        know). False: some differ, nothing was done."""
        ids = {ref.sample_id for ref in refs}
        reserved = {(ref.generation, ref.sample_id) for ref in refs if ref.generation}
        ordinals, known = self._leased_and_known([ref.source_task_id for ref in refs], ids)
        as_a_rule = (
            len(ids) == len(refs)
            and not known
            and len(ordinals) in ([0, len(refs)] if self._knows_leased_prompts_only() else [len(refs)])
            and (not reserved or self._intents_among(reserved) == reserved)
        )
        if not as_a_rule:
            return False
        if reserved:
            gone = json_list(generation for generation, _ in reserved)
            self._change(f"DELETE FROM intent WHERE generation {AMONG}", gone)  # noqa: S608 (ours)
        if ordinals:
            gone = json_list(ordinals.values())
            self._change(f"DELETE FROM task WHERE ordinal {AMONG}", gone)  # noqa: S608 (ours)
        self._insert_samples(
            [(r, text, ordinals.get(r.source_task_id)) for r, text in zip(refs, texts, strict=True)]
        )
        return True

    def _leased_and_known(
        self, task_ids: Iterable[str | None], sample_ids: Iterable[str]
    ) -> tuple[dict[str | None, int], set[str]]:
        """The ordinals of those prompts that have a row, and those samples that have one."""
        rows = self._rows(
            f"SELECT task_id, ordinal FROM task WHERE task_id {AMONG} AND ordinal < ? "  # noqa: S608 (ours)
            f"UNION ALL SELECT sample_id, NULL FROM sample WHERE sample_id {AMONG}",
            *(json_list(task_ids), self._run().next_ordinal, json_list(sample_ids)),
        )
        ordinals = {task_id: ordinal for task_id, ordinal in rows if ordinal is not None}
        return ordinals, {sample_id for sample_id, ordinal in rows if ordinal is None}

    def _knows_leased_prompts_only(self) -> bool:
        """No other place need be searched for a prompt than table task."""
        run = self._run()
        return run.next_ordinal == run.num_tasks and run.folded_seq == 0

    def _intents_among(self, reserved: Iterable[tuple[int, str]]) -> set[tuple[int, str]]:
        sql = f"SELECT generation, sample_id FROM intent WHERE generation {AMONG}"  # noqa: S608 (ours)
        return set(self._rows(sql, json_list(g for g, _ in reserved)))

    def _known(self, sample_ids: Sequence[str]) -> set[str]:
        """Those that have a row."""
        sql = f"SELECT sample_id FROM sample WHERE sample_id {AMONG}"  # noqa: S608 (ours)
        return {sample_id for (sample_id,) in self._rows(sql, json_list(sample_ids))}

    def _may_commit(self, ref: SampleRef) -> bool:
        if ref.generation == 0:
            return True
        found = self._value(
            "SELECT 1 FROM intent WHERE generation = ?1 AND sample_id = ?2 UNION "
            "SELECT 1 FROM sample WHERE sample_id = ?2 AND (generation = ?1 OR state = 'released')",
            *(ref.generation, ref.sample_id),
        )
        return found is not None or self._is_folded(ref.sample_id)

    def _commit_ref(self, ref: SampleRef, text: str) -> bool:
        self._change("DELETE FROM intent WHERE generation = ?", ref.generation)
        has_row = self._value("SELECT 1 FROM task WHERE task_id = ?", ref.source_task_id) is not None
        known = self._rows(
            "SELECT seq, state, generation, ordinal FROM sample WHERE sample_id = ?", ref.sample_id
        )
        if known:
            seq, state, generation, ordinal = known[0]
            if state != "lost" and (has_row or ordinal is None):
                self._finish_task_of(seq, ref.source_task_id)
            if state != "lost" or generation == ref.generation != 0:
                return False
            self._finish_task_of(seq, ref.source_task_id, failed_too=True)
            if self._value("SELECT durable FROM ack WHERE sample_id = ?", ref.sample_id):
                self._change("UPDATE sample SET state = 'released' WHERE seq = ?", seq)
                return False  # by now durable weights contain it
            self._change(
                "UPDATE sample SET state = 'present', resident = 1, bytes = ?, generation = ?, ref = ? "
                "WHERE seq = ?",
                *(ref.estimated_bytes, ref.generation, text, seq),
            )
            return True
        # Samples are folded only when their prompts have no row any more.
        if not has_row and self._folded_record(ref.sample_id) is not None:
            return False
        ordinal = self._finish_task(ref.source_task_id, failed_too=True)
        self._insert_samples([(ref, text, ordinal)])
        return True

    def _finish_task_of(self, seq: int, task_id: str | None, *, failed_too: bool = False) -> None:
        """Its prompt may have become known only after the sample was entered."""
        ordinal = self._finish_task(task_id, failed_too=failed_too)
        self._change("UPDATE sample SET ordinal = coalesce(ordinal, ?) WHERE seq = ?", ordinal, seq)

    def _insert_samples(self, samples: Sequence[tuple[SampleRef, str, int | None]]) -> None:
        """Refs, each with its JSON and its prompt's ordinal, at the next places of the log."""
        run = self._run()
        self._db.executemany(
            "INSERT INTO sample (seq, sample_id, task_id, ordinal, bytes, generation, ref) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (seq, r.sample_id, r.source_task_id, ordinal, r.estimated_bytes, r.generation, text)
                for seq, (r, text, ordinal) in enumerate(samples, start=run.last_seq + 1)
            ],
        )
        run.last_seq += len(samples)

    def is_committed(self, sample_id: str) -> bool:
        return self.sample_record(sample_id) is not None

    def get_committed(self, sample_id: str) -> SampleRef | None:
        ref = self._value("SELECT ref FROM sample WHERE sample_id = ?", sample_id)
        if ref is not None:
            return ref_from_json(ref)
        return next((folded_ref(i, task) for _, i, task, _ in self._folded_samples() if i == sample_id), None)

    def sample_record(self, sample_id: str) -> SampleRecord | None:
        rows = self._rows(
            "SELECT seq, state, task_id, iif(durable IS NULL, quarantine_step, step), coalesce(durable, 0), "
            "reason FROM sample LEFT JOIN ack USING (sample_id) WHERE sample_id = ?",
            sample_id,
        )
        if not rows:
            return self._folded_record(sample_id)
        seq, state, task_id, step, durable, reason = rows[0]
        return SampleRecord(sample_id, seq, state, task_id, step, bool(durable), reason)

    def committed_count(self) -> int:
        return self._run().last_seq

    def all_committed_ids(self) -> list[str]:
        with self._reading():
            rows = [(seq, i) for seq, i, _, _ in self._folded_samples()]
            rows += self._rows("SELECT seq, sample_id FROM sample")
        return [sample_id for _, sample_id in sorted(rows)]

    def read_committed(self, after_seq: int, limit: int) -> list[CommittedRef]:
        with self._reading():
            found = self._folded_refs(after_seq, limit)
            rows = self._rows(
                "SELECT seq, ref, state FROM sample WHERE seq > ? ORDER BY seq LIMIT ?", after_seq, limit
            )
        found += [
            CommittedRef(seq, ref_from_json(ref), state != "lost", state == "quarantined")
            for seq, ref, state in rows
        ]
        return sorted(found, key=lambda entry: entry.seq)[:limit]

    # -- acks ------------------------------------------------------------------------------

    def record_train_ack(
        self,
        sample_ids: Sequence[str],
        *,
        global_step: int | None,
        optimizer_durable: bool,
        fence: Fence | None = None,
    ) -> None:
        with self._mutation(fence, final=optimizer_durable):
            self._ack(sample_ids, global_step, durable=optimizer_durable)

    def _ack(self, sample_ids: Iterable[str], step: int | None, *, durable: bool) -> None:
        ids = list(sample_ids)
        known = self._known(ids)
        self._db.executemany(
            "INSERT INTO ack VALUES (?, ?, ?) ON CONFLICT (sample_id) DO UPDATE "
            "SET step = excluded.step, durable = excluded.durable WHERE durable = 0",
            [(i, step, int(durable)) for i in ids if i in known or self._folded_record(i) is None],
        )

    def _is_folded(self, sample_id: str) -> bool:
        return not self._known([sample_id]) and self._folded_record(sample_id) is not None

    def durable_marker(self) -> dict[str, Any]:
        with self._reading():
            self._refuse_broken()  # what it calls durable may be freed
            folded = list(self._folded_samples())
            durable = bool(folded) or self._value("SELECT 1 FROM ack WHERE durable = 1 LIMIT 1") is not None
            rows = self._rows("SELECT sample_id, step FROM ack WHERE durable = ?", int(durable))
        rows += [(sample_id, step) for _, sample_id, _, step in folded]
        return {
            "acked": {sample_id for sample_id, _ in rows},
            "global_step": max((step for _, step in rows if step is not None), default=None),
            "optimizer_durable": durable,
        }

    # -- features --------------------------------------------------------------------------

    def releasable(self, limit: int) -> list[str]:
        return [row[0] for row in self._covered("sample_id", limit)]

    def _covered(self, columns: str, limit: int) -> list[tuple[Any, ...]]:
        return self._rows(
            f"SELECT {columns} FROM sample LEFT JOIN ack USING (sample_id) "  # noqa: S608 (no outside text)
            f"WHERE resident AND {COVERED} ORDER BY seq LIMIT ?",
            limit,
        )

    def begin_release(self, limit: int, *, fence: Fence | None = None) -> dict[str, int]:
        with self._reading():
            self._refuse_broken()  # the head that covers them may not be on the disk
            if fence is not None:
                epoch = self._value("SELECT epoch FROM role WHERE name = ?", fence.role)
                self._check_fence(fence, epoch or 0)
            return dict(self._covered("sample_id, generation", limit))

    def record_released(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            ids = json_list(sample_ids)
            rows = self._rows(
                f"SELECT sample_id, {COVERED}, iif(state = 'quarantined', ref, NULL) "  # noqa: S608 (ours)
                "FROM sample LEFT JOIN ack USING (sample_id) "
                f"WHERE sample_id {AMONG}",
                ids,
            )
            covered = {sample_id: bool(is_covered) for sample_id, is_covered, _ in rows}
            unknown = [i for i in sample_ids if i not in covered]  # folded, or never committed
            covered.update({i: self._folded_record(i) is not None for i in unknown})
            early = [i for i in sample_ids if not covered[i]]
            if early:
                raise not_covered(early)
            self._change(
                "UPDATE sample SET resident = 0, "  # noqa: S608 (ours)
                f"state = iif(state = 'present', 'released', state) WHERE sample_id {AMONG}",
                ids,
            )
            for sample_id, _, ref in rows:
                if ref is not None:
                    text = ref_to_json(compacted(ref_from_json(ref)))
                    self._change("UPDATE sample SET ref = ? WHERE sample_id = ?", text, sample_id)

    def report_lost(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            durable = "SELECT durable FROM ack WHERE sample_id = ?"
            self._lose(i for i in sample_ids if not self._value(durable, i))

    def _lose(self, sample_ids: Iterable[str]) -> None:
        for sample_id in sample_ids:
            self._change(
                "UPDATE sample SET resident = 0, state = iif(state = 'quarantined', state, 'lost') "
                "WHERE sample_id = ?",
                sample_id,
            )
            for ordinal, task_id in self._rows(
                "SELECT ordinal, task_id FROM sample WHERE sample_id = ? AND state = 'lost'", sample_id
            ):
                self._reopen_task(ordinal, task_id)

    def present_ids(self) -> list[str]:
        return [row[0] for row in self._rows("SELECT sample_id FROM sample WHERE resident ORDER BY seq")]

    def present_generations(self) -> dict[str, int]:
        return dict(self._rows("SELECT sample_id, generation FROM sample WHERE resident ORDER BY seq"))

    def lost_ids(self) -> list[str]:
        rows = self._rows("SELECT sample_id FROM sample WHERE state = 'lost' ORDER BY seq")
        return [row[0] for row in rows]

    def usage(self) -> LedgerUsage:
        with self._reading():
            [resident] = self._rows("SELECT count(*), coalesce(sum(bytes), 0) FROM sample WHERE resident")
            [provisional] = self._rows(
                "SELECT count(*), coalesce(sum(bytes), 0) FROM ack JOIN sample USING (sample_id) "
                "WHERE durable = 0 AND resident"
            )
            [(waiting,)] = self._rows(
                f"SELECT ({WITHOUT_ACK} WHERE resident AND state = 'present' AND durable IS NULL) + "
                f"({WITHOUT_ACK} WHERE state = 'lost' AND durable IS NULL)"
            )
            [reserved] = self._rows("SELECT count(*), coalesce(sum(bytes), 0) FROM intent")
        return LedgerUsage(*(*resident, *provisional, waiting, *reserved))
