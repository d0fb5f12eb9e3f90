"""Folded history: what no decision depends on any more, compressed, a few bytes for each sample.

Trained samples and step plans up to the oldest checkpoint kept can never be undone, so their rows
go into blocks that only people and the checker read. Prompt ids lie in such blocks from the start.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from paceline.crashpoints import reach
from paceline.errors import SchemaError
from paceline.ledger.records import CommittedRef, Fence, SampleRecord, StepPlan
from paceline.ledger.refusals import prompts_differ
from paceline.ledger.stores.sqlite.database import Database
from paceline.types import SampleRef

BLOCK = 4096  # prompts, samples or steps of one block


class Folding(Database):
    fold_from = BLOCK  # how many rows must be ready before any is folded
    _task_memo: tuple[int, str, list[str]] | None = None  # the block of prompt ids last read

    # -- blocks ----------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Several reads that see one state of the ledger."""
        with self._lock, self._explained:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                if self._db.in_transaction:  # an error may have ended it
                    self._db.execute("ROLLBACK")

    @staticmethod
    def _digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def _write_block(self, kind: str, first: int, last: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self._change(
            "INSERT OR REPLACE INTO folded VALUES (?, ?, ?, ?, ?)",
            *(kind, first, last, self._digest(data), lzma.compress(data)),
        )

    def _read_block(self, kind: str, first: int) -> Any:
        [(digest, content)] = self._rows(
            "SELECT digest, content FROM folded WHERE kind = ? AND first = ?", kind, first
        )
        try:
            data = lzma.decompress(content)
        except lzma.LZMAError:
            data = b""
        if self._digest(data) != digest:
            raise SchemaError(
                f"The folded {kind} from {first} on in {self.path} are damaged.",
                why="Part of the run's history cannot be read; samples in flight are not concerned.",
                next="run `paceline fsck RUN`; restore the ledger from a backup to get the history back.",
            )
        return json.loads(data)

    def _blocks(self, kind: str, from_last: int = 0) -> Iterator[Any]:
        for (first,) in self._rows(
            "SELECT first FROM folded WHERE kind = ? AND last >= ? AND content NOT NULL ORDER BY first",
            *(kind, from_last),
        ):
            yield self._read_block(kind, first)

    # -- prompt ids ------------------------------------------------------------------------

    def _append_task_ids(self, task_ids: Sequence[str]) -> None:
        if not task_ids:
            return
        known = self._run().num_tasks
        ids = list(task_ids)
        open_block = self._rows(
            "SELECT first FROM folded WHERE kind = 'tasks' AND last - first + 1 < ? AND content NOT NULL "
            "ORDER BY first DESC LIMIT 1",
            BLOCK,
        )
        first = known
        if open_block:  # only the last block is ever short
            first = open_block[0][0]
            ids = self._read_block("tasks", first) + ids
        for start in range(0, len(ids), BLOCK):
            part = ids[start : start + BLOCK]
            self._write_block("tasks", first + start, first + start + len(part) - 1, part)
        self._run().num_tasks = known + len(task_ids)

    def _task_ids_between(self, start: int, stop: int) -> list[str]:
        """The ids of prompts `start` to `stop - 1`, all of them known."""
        found: list[str] = []
        while start < stop:
            first = self._value("SELECT max(first) FROM folded WHERE kind = 'tasks' AND first <= ?", start)
            digest = self._value("SELECT digest FROM folded WHERE kind = 'tasks' AND first = ?", first)
            if self._task_memo is None or self._task_memo[:2] != (first, digest):
                self._task_memo = (first, digest, self._read_block("tasks", first))
            part = self._task_memo[2][start - first : stop - first]
            assert part, "blocks follow each other without a gap"
            found += part
            start += len(part)
        return found

    def _unleased_ordinal(self, task_id: str) -> int | None:
        """For a commit without a lease; searches every prompt that was never leased."""
        start, end = self._run().next_ordinal, self._run().num_tasks
        ids = self._task_ids_between(start, end)
        return start + ids.index(task_id) if task_id in ids else None

    def _known_task_ids(self) -> set[str]:
        """Every prompt id. Raises ConfigError once some are history: then the list must begin with them."""
        if self._value("SELECT 1 FROM folded WHERE kind = 'tasks' AND content IS NULL"):
            raise prompts_differ(self._run().num_tasks)
        return {task_id for block in self._blocks("tasks") for task_id in block}

    # -- folding ---------------------------------------------------------------------------

    def compact(self, *, fence: Fence | None = None) -> int:
        with self._mutation(fence):
            oldest = self._value("SELECT coalesce(min(step), 0) FROM checkpoint")
            self._run().folded_step = max(self._run().folded_step, oldest)
            ready = self._value("SELECT count(*) FROM ack WHERE durable = 1 AND step <= ?", oldest)
            plans = self._value("SELECT count(*) FROM plan WHERE step <= ?", oldest)
            folded = 0
            if max(ready, plans) >= self.fold_from:
                self._fold_plans(oldest)
                reach("ledger.between_folds")
                folded = self._fold_samples(oldest)
                self._fold_task_ids()
            return folded

    def _fold_plans(self, oldest: int) -> None:
        """Before their samples: while those have rows, ids turn into seqs."""
        rows = self._rows(
            "SELECT step, rev, last_seq, sample_ids FROM plan WHERE step <= ? ORDER BY step", oldest
        )
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            content = [[step, rev, last, self._seqs(json.loads(ids))] for step, rev, last, ids in part]
            self._write_block("steps", part[0][0], part[-1][0], content)
        self._change("DELETE FROM plan WHERE step <= ?", oldest)

    def _seqs(self, sample_ids: Sequence[str]) -> list[int | str]:
        """The seq of each; an id that was never committed stays an id."""
        seqs = [self._value("SELECT seq FROM sample WHERE sample_id = ?", i) for i in sample_ids]
        return [i if seq is None else seq for i, seq in zip(sample_ids, seqs, strict=True)]

    def _fold_samples(self, oldest: int) -> int:
        """Only samples of known prompts that have no row: those are never committed again by mistake."""
        rows = self._rows(
            "SELECT seq, sample_id, task_id, step FROM sample JOIN ack USING (sample_id) "
            "WHERE state = 'released' AND durable = 1 AND step <= ? AND ordinal NOT NULL "
            "AND ordinal < ? AND ordinal NOT IN (SELECT ordinal FROM task) ORDER BY seq",
            *(oldest, self._run().next_ordinal),
        )
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            seqs, ids, tasks, steps = (list(column) for column in zip(*part, strict=True))
            content = {"seq": seqs, "sample_id": ids, "task_id": tasks, "step": steps}
            self._write_block("samples", seqs[0], seqs[-1], content)
            self._db.executemany("DELETE FROM ack WHERE sample_id = ?", [(i,) for i in ids])
            self._db.executemany("DELETE FROM sample WHERE seq = ?", [(seq,) for seq in seqs])
            self._run().folded_seq = max(self._run().folded_seq, seqs[-1])
        return len(rows)

    def _fold_task_ids(self) -> None:
        """The ids of prompts that are all done and folded are in their samples' blocks already."""
        blocks = self._rows(
            "SELECT first, last FROM folded WHERE kind = 'tasks' AND content NOT NULL "
            "AND last - first + 1 >= ? AND last < ? "
            "AND NOT EXISTS (SELECT 1 FROM task WHERE ordinal BETWEEN first AND last)",
            *(BLOCK, self._run().next_ordinal),
        )
        in_rows = sorted(row[0] for row in self._rows("SELECT ordinal FROM sample WHERE ordinal NOT NULL"))
        for first, last in blocks:
            if bisect_left(in_rows, first) == bisect_right(in_rows, last):
                self._change("UPDATE folded SET content = NULL WHERE kind = 'tasks' AND first = ?", first)

    # -- reading it ------------------------------------------------------------------------

    def _folded_samples(self, after_seq: int = 0) -> Iterator[tuple[int, str, str | None, int]]:
        """(seq, sample id, task id, step of its ack) of folded samples, block by block."""
        if after_seq < self._run().folded_seq:
            for block in self._blocks("samples", after_seq + 1):
                columns = (block["seq"], block["sample_id"], block["task_id"], block["step"])
                yield from (row for row in zip(*columns, strict=True) if row[0] > after_seq)

    def _folded_refs(self, after_seq: int, limit: int) -> list[CommittedRef]:
        found: list[CommittedRef] = []
        if after_seq >= self._run().folded_seq:
            return found
        for (first,) in self._rows(
            "SELECT first FROM folded WHERE kind = 'samples' AND last > ? ORDER BY first", after_seq
        ):
            if len(found) == limit and first > found[-1].seq:
                break
            block = self._read_block("samples", first)
            for seq, sample_id, task_id in zip(
                block["seq"], block["sample_id"], block["task_id"], strict=True
            ):
                if seq > after_seq:
                    found.append(CommittedRef(seq, folded_ref(sample_id, task_id)))
            found = sorted(found, key=lambda entry: entry.seq)[:limit]
        return found

    def _folded_record(self, sample_id: str) -> SampleRecord | None:
        for seq, known, task_id, step in self._folded_samples():
            if known == sample_id:
                return SampleRecord(sample_id, seq, "released", task_id, step, durable=True)
        return None

    def _folded_plans(self) -> Iterator[StepPlan]:
        """In step order. Reads every block of samples once."""
        ids: dict[int, str] | None = None
        for block in self._blocks("steps"):
            if ids is None:
                ids = {seq: i for seq, i, _, _ in self._folded_samples()}
                ids.update(self._rows("SELECT seq, sample_id FROM sample"))
            for step, rev, last_seq, seqs in block:
                names = tuple(ids[seq] if isinstance(seq, int) else seq for seq in seqs)
                yield StepPlan(step, names, last_seq, rev)


def folded_ref(sample_id: str, task_id: str | None) -> SampleRef:
    """All that is left of the ref of a sample whose history is folded."""
    return SampleRef(sample_id, "", task_id, "", {}, {}, "")
