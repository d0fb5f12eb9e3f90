"""Prompt tasks: rows only for those that are leased, failed, or to be captured again."""

from __future__ import annotations

import json
from collections.abc import Sequence

from paceline.ledger.records import Fence, TaskLease
from paceline.ledger.stores.sqlite.folding import Folding


class TaskTable(Folding):
    def add_tasks(self, task_ids: Sequence[str], *, fence: Fence | None = None) -> int:
        with self._mutation(fence):
            same = self._known_prefix(task_ids)
            whole = same == self._run().num_tasks
            known = set(task_ids[:same]) if whole else self._known_task_ids()
            new = [i for i in dict.fromkeys(task_ids[same:]) if i not in known]
            self._append_task_ids(new)
            return len(new)

    def lease_tasks(
        self,
        worker_id: str,
        limit: int,
        *,
        group_size: int | None = None,
        fence: Fence | None = None,
        op_id: str | None = None,
    ) -> list[TaskLease]:
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                return [TaskLease(**lease) for lease in operation.result]
            rows = self._rows(
                "SELECT task_id, ordinal, attempt, deaths FROM task "
                "WHERE state = 'pending' ORDER BY ordinal LIMIT ?",
                limit,
            )
            again = [TaskLease(*row) for row in rows]
            leases = sorted(again + self._never_leased(limit), key=lambda lease: lease.ordinal)[:limit]
            if group_size is not None:
                leases = [x for x in leases if x.ordinal // group_size == leases[0].ordinal // group_size]
            self._db.executemany(
                "INSERT INTO task (ordinal, task_id, state, holder) VALUES (?, ?, 'leased', ?) "
                "ON CONFLICT (ordinal) DO UPDATE SET state = 'leased', holder = excluded.holder",
                [(lease.ordinal, lease.task_id, worker_id) for lease in leases],
            )
            known = {lease.ordinal for lease in again}
            first_times = [lease.ordinal for lease in leases if lease.ordinal not in known]
            if first_times:
                self._run().next_ordinal = first_times[-1] + 1
                self._change("DELETE FROM task WHERE state = 'done' AND ordinal <= ?", first_times[-1])
            operation.keep([vars(lease) for lease in leases])
            return leases

    def _never_leased(self, limit: int) -> list[TaskLease]:
        """The first `limit` prompts that no one ever leased or committed."""
        found: list[TaskLease] = []
        ordinal, end = self._run().next_ordinal, self._run().num_tasks
        while ordinal < end and len(found) < limit:
            stop = min(end, ordinal + limit - len(found))
            rows = self._rows("SELECT ordinal FROM task WHERE ordinal >= ? AND ordinal < ?", ordinal, stop)
            taken = {n for (n,) in rows}
            ids = enumerate(self._task_ids_between(ordinal, stop), start=ordinal)
            found += [TaskLease(task_id, n, 0) for n, task_id in ids if n not in taken]
            ordinal = stop
        return found

    def _ordinal_of(self, task_id: str | None) -> int | None:
        """Of a prompt with a row or one that was never leased; None if the ledger knows neither."""
        if task_id is None:
            return None
        ordinal: int | None = self._value("SELECT ordinal FROM task WHERE task_id = ?", task_id)
        return self._unleased_ordinal(task_id) if ordinal is None else ordinal

    def _finish_task(self, task_id: str | None, *, failed_too: bool = False) -> int | None:
        """Its sample is committed; the prompt's ordinal, None if the ledger does not know the prompt."""
        ordinal = self._ordinal_of(task_id)
        if ordinal is None:
            return None
        if not failed_too and self._value("SELECT state FROM task WHERE ordinal = ?", ordinal) == "failed":
            return ordinal
        if ordinal < self._run().next_ordinal:
            self._change("DELETE FROM task WHERE ordinal = ?", ordinal)
        else:
            self._change(
                "INSERT INTO task (ordinal, task_id, state) VALUES (?, ?, 'done') "
                "ON CONFLICT (ordinal) DO UPDATE SET state = 'done', holder = '', attempt = 0, deaths = 0",
                *(ordinal, task_id),
            )
        return ordinal

    def _bury_task(self, ordinal: int | None, task_id: str | None, reason: str) -> None:
        """Its sample is in quarantine: nobody captures the prompt again, if it was still to be captured."""
        ordinal = self._ordinal_of(task_id) if ordinal is None else ordinal
        self._change(
            "INSERT INTO task (ordinal, task_id, state, reason) SELECT ?1, ?2, 'failed', ?3 "
            "WHERE ?1 >= ?4 OR ?1 IN (SELECT ordinal FROM task) "
            "ON CONFLICT (ordinal) DO UPDATE SET state = 'failed', reason = excluded.reason "
            "WHERE state = 'pending'",
            *(ordinal, task_id, reason, self._run().next_ordinal),
        )

    def _reopen_task(self, ordinal: int | None, task_id: str | None) -> None:
        """Its sample is lost: capture the prompt again, unless that failed for good."""
        if ordinal is not None and task_id is not None:
            self._change(
                "INSERT INTO task (ordinal, task_id) VALUES (?, ?) ON CONFLICT (ordinal) "
                "DO UPDATE SET state = 'pending', holder = '' WHERE state = 'done'",
                *(ordinal, task_id),
            )

    def fail_tasks(
        self,
        worker_id: str,
        task_ids: Sequence[str],
        *,
        reason: str,
        attempt_max: int | None,
        fence: Fence | None = None,
    ) -> list[str]:
        buried = []
        limit = 0 if attempt_max is None else attempt_max
        with self._mutation(fence, final=True):
            for task_id in task_ids:
                state = self._value(
                    "UPDATE task SET attempt = attempt + 1, holder = '', reason = ?, "
                    "state = iif(attempt + 1 >= ?, 'failed', 'pending') "
                    "WHERE task_id = ? AND state = 'leased' AND holder = ? RETURNING state",
                    *(reason, limit, task_id, worker_id),
                )
                if state == "failed":
                    buried.append(task_id)
                    # A lost sample whose prompt cannot be captured any more will never come back.
                    self._change(
                        "UPDATE sample SET state = 'quarantined', reason = ? "
                        "WHERE task_id = ? AND state = 'lost'",
                        *(reason, task_id),
                    )
        return buried

    def return_tasks(self, worker_id: str, task_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            for task_id in task_ids:
                self._change(
                    "UPDATE task SET state = 'pending', holder = '' "
                    "WHERE task_id = ? AND state = 'leased' AND holder = ?",
                    *(task_id, worker_id),
                )

    def task_counts(self) -> dict[str, int]:
        with self._reading():
            rows = dict(self._rows("SELECT state, count(*) FROM task GROUP BY state"))
            run = self._run()
            known, following = run.num_tasks, run.next_ordinal
            ahead = self._value("SELECT count(*) FROM task WHERE ordinal >= ?", following)
        behind = sum(rows.values()) - ahead
        return {
            "pending": rows.get("pending", 0) + known - following - ahead,
            "leased": rows.get("leased", 0),
            "done": rows.get("done", 0) + following - behind,
            "failed": rows.get("failed", 0),
        }

    def failed_tasks(self) -> dict[str, str]:
        return dict(self._rows("SELECT task_id, reason FROM task WHERE state = 'failed' ORDER BY ordinal"))

    def _known_prefix(self, task_ids: Sequence[str]) -> int:
        """How many prompts on record, from the first on, this list begins with."""
        same = 0
        for first, last, digest in self._rows(
            "SELECT first, last, digest FROM folded WHERE kind = 'tasks' ORDER BY first"
        ):
            if self._digest(json.dumps(list(task_ids[first : last + 1])).encode()) != digest:
                break
            same = last + 1
        return same
