"""Prompts: their number and digests. Only prompts that are leased, failed, or pending again have rows."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.ledger.records import Lease, SourceBlock
from paceline.ledger.refusals import prompts_differ
from paceline.ledger.stores.sqlite.database import Database, change
from paceline.ledger.stores.sqlite.text import AMONG, json_list

NO_BOUND = 1 << 62


class PromptTable(Database):
    # -- the source ------------------------------------------------------------------------

    @change()
    def extend(self, blocks: Sequence[SourceBlock]) -> int:
        run, before = self._run(), self._run().num_prompts
        for block in blocks:
            if block.first == run.num_prompts:
                self._change("INSERT INTO source VALUES (?, ?, ?)", block.first, block.count, block.digest)
                run.num_prompts += block.count
                run.closed = 0
            elif self.source_blocks(block.first, 1) != [block]:
                raise prompts_differ(block.first, before)
        return run.num_prompts - before

    def source_blocks(self, first: int = 0, limit: int | None = None) -> list[SourceBlock]:
        rows = self._rows(
            "SELECT first, count, digest FROM source WHERE first >= "
            "coalesce((SELECT max(first) FROM source WHERE first <= ?), 0) AND first + count > ? "
            "ORDER BY first LIMIT ?",
            *(first, first, -1 if limit is None else limit),
        )
        return [SourceBlock(*row) for row in rows]

    @change()
    def forget_prompts(self) -> bool:
        bound = self._value(
            "SELECT 1 FROM prompt WHERE state != 'pending' UNION ALL SELECT 1 FROM intent WHERE NOT revoked "
            "UNION ALL SELECT 1 FROM plan UNION ALL SELECT 1 FROM checkpoint LIMIT 1"
        )
        run = self._run()
        if bound or run.committed:
            return self._unchanged(False)
        self._change("DELETE FROM source")
        self._change("DELETE FROM prompt")
        run.num_prompts = run.next_ordinal = run.closed = 0
        return True

    # -- leases ----------------------------------------------------------------------------

    @change()
    def lease(self, limit: int, group_size: int | None = None, below: int | None = None) -> list[Lease]:
        run, size, worker = self._run(), group_size or 1, self._worker
        below = NO_BOUND if below is None else below
        rows = self._rows(
            "SELECT ordinal, attempt, deaths FROM prompt AS mine WHERE state = 'pending' AND NOT EXISTS ("
            "SELECT 1 FROM prompt WHERE ordinal >= mine.ordinal / ?1 * ?1 "
            "AND ordinal < mine.ordinal / ?1 * ?1 + ?1 AND state = 'leased' AND worker != ?2) "
            "AND ordinal < ?3 ORDER BY ordinal LIMIT ?4",
            *(size, worker, below, limit),
        )
        first = run.next_ordinal // size * size
        is_held = self._value(
            "SELECT 1 FROM prompt WHERE ordinal >= ? AND state = 'leased' AND worker != ?", first, worker
        )
        end = run.next_ordinal if is_held else run.next_ordinal + limit - len(rows)
        new = range(run.next_ordinal, min(run.num_prompts, below, end))
        leases = [Lease(*row) for row in rows] + [Lease(ordinal) for ordinal in new]
        if not leases:
            return self._unchanged([])
        leases.sort(key=lambda lease: lease.ordinal)
        if group_size is not None:
            leases = [x for x in leases if x.ordinal // group_size == leases[0].ordinal // group_size]
        self._db.executemany(
            "INSERT INTO prompt (ordinal, state, worker) VALUES (?, 'leased', ?) "
            "ON CONFLICT (ordinal) DO UPDATE SET state = 'leased', worker = excluded.worker",
            [(lease.ordinal, worker) for lease in leases],
        )
        run.next_ordinal = max([run.next_ordinal, *(lease.ordinal + 1 for lease in leases)])
        return leases

    @change(final_if="failure")
    def give_back(
        self, ordinals: Sequence[int], *, failure: str | None = None, attempt_max: int | None = None
    ) -> list[int]:
        failed = []
        self._change(
            f"UPDATE intent SET revoked = 1 WHERE worker = ? AND ordinal {AMONG}",  # noqa: S608 (ours)
            *(self._worker, json_list(ordinals)),
        )
        for ordinal in ordinals:
            state = self._value(
                "UPDATE prompt SET worker = '', attempt = attempt + ?1, reason = iif(?1, ?2, reason), "
                "state = iif(?1 AND attempt + 1 >= ?3, 'failed', 'pending') "
                "WHERE ordinal = ?4 AND state = 'leased' AND worker = ?5 RETURNING state",
                *(failure is not None, failure, attempt_max or 0, ordinal, self._worker),
            )
            if state == "failed" and not self._end_lost_sample(ordinal, failure or ""):
                failed.append(ordinal)
        return failed

    def _end_lost_sample(self, ordinal: int, reason: str) -> bool:
        """The prompt will not be captured again. Quarantine its lost sample, unless durable weights came to
        contain it: then the prompt is done; whether it is."""
        is_its = "state = 'lost' AND (place = ?1 AND ordinal = place OR ordinal = ?1 AND ordinal != place)"
        if self._change(f"UPDATE sample SET state = 'released' WHERE acked = 2 AND {is_its}", ordinal):  # noqa: S608 (ours)
            self._change("DELETE FROM prompt WHERE ordinal = ?", ordinal)
            return True
        self._change(
            f"UPDATE sample SET state = 'quarantined', acked = 0, step = NULL, reason = ?2 WHERE {is_its}",  # noqa: S608 (ours)
            *(ordinal, reason),
        )
        return False

    def _end_work_of(self, worker: str) -> None:
        """The worker died: return its leases, each with one more death, and revoke its intents."""
        self._change("UPDATE intent SET revoked = 1 WHERE worker = ?", worker)
        self._change(
            "UPDATE prompt SET state = 'pending', worker = '', deaths = deaths + 1 "
            "WHERE state = 'leased' AND worker = ?",
            worker,
        )

    @change(final=True)
    def end_stream(self, ended: bool) -> bool:
        run = self._run()
        is_open = self._value("SELECT 1 FROM prompt WHERE state != 'failed' LIMIT 1") is not None
        ends = ended and not is_open and run.next_ordinal >= run.num_prompts
        if ends == bool(run.closed):
            return self._unchanged(ends)
        run.closed = int(ends)
        return ends

    # -- prompts at a commit or a checkpoint -----------------------------------------------

    def _pass_over(self, ordinal: int) -> None:
        """Count the prompt as leased once; earlier prompts that never were become pending."""
        run = self._run()
        if ordinal >= run.next_ordinal:
            self._db.executemany(
                "INSERT INTO prompt (ordinal) VALUES (?)", [(n,) for n in range(run.next_ordinal, ordinal)]
            )
            run.next_ordinal = ordinal + 1

    def _finish_prompt(self, ordinal: int | None) -> None:
        """The prompt's sample is committed."""
        if ordinal is not None:
            self._pass_over(ordinal)
            self._change("DELETE FROM prompt WHERE ordinal = ? AND state != 'failed'", ordinal)

    def _reopen_prompt(self, ordinal: int | None) -> None:
        """The sample is lost: capture the prompt again, unless it is being captured or has failed."""
        if ordinal is not None:
            self._pass_over(ordinal)
            self._change(
                "INSERT INTO prompt (ordinal, again) VALUES (?, 1) "
                "ON CONFLICT (ordinal) DO UPDATE SET again = 1",
                ordinal,
            )

    def _settled(self) -> int:
        """The first place that a sample may still take."""
        run = self._run()
        if run.place_order == "arrival":
            return run.committed
        first = self._value("SELECT min(ordinal) FROM prompt WHERE state != 'failed' AND NOT again")
        return run.next_ordinal if first is None else int(first)

    def failed(self, start: int = 0, stop: int | None = None) -> dict[int, str]:
        rows = self._rows(
            "SELECT ordinal, reason FROM prompt WHERE state = 'failed' AND ordinal >= ? AND ordinal < ? "
            "ORDER BY ordinal",
            *(start, NO_BOUND if stop is None else stop),
        )
        return dict(rows)
