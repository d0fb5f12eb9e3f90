"""Prompt tasks."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.ledger.records import (
    Fence,
    TaskLease,
)
from paceline.ledger.stores.memory.rows import Rows, TaskRow


class Tasks(Rows):
    def add_tasks(self, task_ids: Sequence[str], *, fence: Fence | None = None) -> int:
        with self._mutation(fence):
            before = len(self._tasks)
            for task_id in task_ids:
                self._tasks.setdefault(task_id, TaskRow(ordinal=len(self._tasks)))
            return len(self._tasks) - before

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
                return list(operation.result)
            pending = [(i, task) for i, task in self._tasks.items() if task.state == "pending"][:limit]
            if group_size is not None and pending:
                group = pending[0][1].ordinal // group_size
                pending = [(i, task) for i, task in pending if task.ordinal // group_size == group]
            for _, task in pending:
                task.state, task.holder = "leased", worker_id
            leases = [TaskLease(i, task.ordinal, task.attempt, task.deaths) for i, task in pending]
            return list(operation.keep(leases))

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
        with self._mutation(fence):
            for task_id in task_ids:
                task = self._tasks.get(task_id)
                if task is None or task.state != "leased" or task.holder != worker_id:
                    continue
                task.attempt += 1
                task.holder, task.reason = "", reason
                final = attempt_max is None or task.attempt >= attempt_max
                task.state = "failed" if final else "pending"
                if final:
                    buried.append(task_id)
                    self._give_up_lost(task_id, reason)
        return buried

    def _give_up_lost(self, task_id: str, reason: str) -> None:
        """A lost sample whose prompt cannot be captured any more will never come back."""
        for sample in self._samples.values():
            if sample.ref.source_task_id == task_id and sample.state == "lost":
                sample.state, sample.reason = "quarantined", reason

    def return_tasks(self, worker_id: str, task_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            for task_id in task_ids:
                task = self._tasks.get(task_id)
                if task is not None and task.state == "leased" and task.holder == worker_id:
                    task.state, task.holder = "pending", ""

    def _finish_task(self, task_id: str | None, *, failed_too: bool = False) -> None:
        task = self._tasks.get(task_id or "")
        if task is not None and (failed_too or task.state != "failed"):
            task.state, task.holder, task.attempt, task.deaths = "done", "", 0, 0

    def task_counts(self) -> dict[str, int]:
        counts = dict.fromkeys(("pending", "leased", "done", "failed"), 0)
        with self._changed:
            for task in self._tasks.values():
                counts[task.state] += 1
        return counts

    def failed_tasks(self) -> dict[str, str]:
        with self._changed:
            return {i: task.reason for i, task in self._tasks.items() if task.state == "failed"}
