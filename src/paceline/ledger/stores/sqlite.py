"""The metadata store in one SQLite file, opened by every process of a run on one host.

WAL with synchronous=FULL: what a call committed survives `kill -9` and power loss. Writers of
all processes queue at a gate (see ledger/gate.py), take BEGIN IMMEDIATE, and either commit
whole or roll back whole; an error leaves no open transaction behind. apsw carries its own
SQLite, because versions before 3.51.3 can corrupt a write-ahead log with two connections.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from time import monotonic
from typing import Any

import apsw

from paceline.crashpoints import reach
from paceline.errors import LedgerError, SchemaError
from paceline.ledger.bell import Bell
from paceline.ledger.gate import WriterGate, refuse_network_filesystem
from paceline.ledger.refusals import behind_head, fenced, head_is_kept, not_covered
from paceline.ledger.store import (
    CheckpointRecord,
    CommittedRef,
    Fence,
    LedgerUsage,
    MetadataStore,
    StepPlan,
    TaskLease,
    compacted,
)
from paceline.types import SampleRef, ref_from_json, ref_to_json

APPLICATION_ID = 0x50414345  # "PACE"
SCHEMA_USER_VERSION = 1
SQLITE_FLOOR = (3, 51, 3)
SQLITE_BACKPORTS = ((3, 44, 6), (3, 50, 7))


def check_sqlite_version(version: str) -> None:
    """Raise SchemaError for a SQLite that may carry the WAL-reset bug (fixed in 3.51.3)."""
    number = tuple(int(part) for part in version.split(".")[:3])
    fixed = number >= SQLITE_FLOOR or any(number[:2] == b[:2] and number >= b for b in SQLITE_BACKPORTS)
    if not fixed:
        raise SchemaError(
            f"SQLite {version} may corrupt a write-ahead log that two processes write.",
            why="The ledger is what the guarantee rests on.",
            next="pip install --upgrade 'apsw>=3.54.1.0'",
        )


class SQLiteMetadataStore(MetadataStore):
    durable = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_sqlite_version(apsw.sqlite_lib_version())
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_network_filesystem(self.path.parent)
        self._lock = threading.RLock()
        self._bell = Bell(self.path.with_name(self.path.name + "-bell"))
        self._gate = WriterGate(self.path.with_name(self.path.name + "-gate"))
        self._closed = False
        with self._lock, self._gate.writing(), self._explained():
            self._db = apsw.Connection(str(self.path))
            self._db.set_busy_timeout(60_000)
            self._open_schema()

    def _open_schema(self) -> None:
        application = self._value("PRAGMA application_id")
        version = self._value("PRAGMA user_version")
        is_new = self._value("SELECT count(*) FROM sqlite_schema") == 0
        if not is_new and application != APPLICATION_ID:
            raise SchemaError(
                f"{self.path} is a database of another program (application id {application:#x}).",
                why="Writing to it would damage it.",
                next="choose another run.directory, or move that file away.",
            )
        if version > SCHEMA_USER_VERSION:
            raise SchemaError(
                f"{self.path} has schema version {version}; this Paceline knows {SCHEMA_USER_VERSION}.",
                why="A newer version wrote it, and guessing at its meaning could lose samples.",
                next="upgrade paceline, or open the run with the version that made it.",
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if is_new:
            schema = resources.files("paceline.ledger.stores").joinpath("schema.sql").read_text()
            with self._transaction():
                self._db.execute(schema)
                self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version={SCHEMA_USER_VERSION}")

    # -- transactions ----------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            reach("ledger.before_commit")
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _mutation(self, fence: Fence | None) -> Iterator[None]:
        with self._lock, self._explained(), self._gate.writing(), self._transaction():
            if fence is not None:
                epoch = self._value("SELECT epoch FROM role WHERE name = ?", fence.role)
                if epoch != fence.epoch:
                    raise fenced(fence, epoch or 0)
            yield
            self._db.execute("UPDATE run SET lsn = lsn + 1")
        reach("ledger.after_commit")
        self._bell.ring()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what SQLite says into what the user can do."""
        try:
            yield
        except apsw.FullError as error:
            raise LedgerError(
                f"The disk of {self.path} is full ({error}).",
                why="The change was rolled back; everything committed before is safe.",
                next="free space on that disk and run the same command again.",
            ) from error
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise SchemaError(
                f"{self.path} is damaged or no database ({error}).",
                why="The ledger cannot be trusted, so nothing was changed.",
                next="restore it from a backup, or start a new run in another run.directory.",
            ) from error
        except (apsw.IOError, apsw.BusyError, apsw.ReadOnlyError, apsw.CantOpenError) as error:
            raise LedgerError(
                f"{self.path} cannot be read or written ({error}).",
                why="The change was rolled back; everything committed before is safe.",
                next="check the disk and its permissions, then run the same command again.",
            ) from error
        except apsw.ConnectionClosedError as error:
            raise LedgerError(f"{self.path} is closed.", next="open a new SQLiteMetadataStore.") from error

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, self._explained():
            return list(self._db.execute(sql, values))

    def _value(self, sql: str, *values: Any) -> Any:
        rows = self._rows(sql, *values)
        return rows[0][0] if rows else None

    # -- samples ---------------------------------------------------------------------------

    def commit_samples(self, refs: Sequence[SampleRef], *, fence: Fence | None = None) -> list[bool]:
        rows = [(r.sample_id, r.source_task_id, r.estimated_bytes, ref_to_json(r)) for r in refs]
        if not rows:
            return []
        with self._mutation(fence):
            return [self._commit(*row) for row in rows]

    def _commit(self, sample_id: str, task_id: str | None, size: int, ref: str) -> bool:
        self._db.execute(
            "INSERT INTO sample (sample_id, task_id, bytes, ref) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (sample_id) DO UPDATE SET state = 'present', bytes = excluded.bytes, "
            "ref = excluded.ref, compacted = 0 WHERE state = 'lost'",
            (sample_id, task_id, size, ref),
        )
        fresh = self._db.changes() == 1
        if fresh and task_id is not None:
            self._db.execute(
                "UPDATE task SET state = 'done', holder = '', attempt = 0 WHERE task_id = ?", (task_id,)
            )
        return fresh

    def is_committed(self, sample_id: str) -> bool:
        return self._value("SELECT 1 FROM sample WHERE sample_id = ?", sample_id) is not None

    def get_committed(self, sample_id: str) -> SampleRef | None:
        ref = self._value("SELECT ref FROM sample WHERE sample_id = ?", sample_id)
        return None if ref is None else ref_from_json(ref)

    def committed_count(self) -> int:
        return int(self._value("SELECT count(*) FROM sample"))

    def all_committed_ids(self) -> list[str]:
        return [row[0] for row in self._rows("SELECT sample_id FROM sample ORDER BY seq")]

    def read_committed(self, after_seq: int, limit: int) -> list[CommittedRef]:
        rows = self._rows(
            "SELECT seq, ref, state != 'lost' FROM sample WHERE seq > ? ORDER BY seq LIMIT ?",
            after_seq,
            limit,
        )
        return [CommittedRef(seq, ref_from_json(ref), bool(present)) for seq, ref, present in rows]

    # -- acks ------------------------------------------------------------------------------

    def record_train_ack(
        self,
        sample_ids: Sequence[str],
        *,
        global_step: int | None,
        optimizer_durable: bool,
        fence: Fence | None = None,
    ) -> None:
        with self._mutation(fence):
            self._db.executemany(
                "INSERT INTO ack VALUES (?, ?, ?) ON CONFLICT (sample_id) DO UPDATE "
                "SET step = excluded.step, durable = excluded.durable WHERE durable = 0",
                [(i, global_step, int(optimizer_durable)) for i in sample_ids],
            )

    def durable_marker(self) -> dict[str, Any]:
        durable = self._value("SELECT 1 FROM ack WHERE durable = 1 LIMIT 1") is not None
        rows = self._rows("SELECT sample_id, step FROM ack WHERE durable = ?", int(durable))
        return {
            "acked": {sample_id for sample_id, _ in rows},
            "global_step": max((step for _, step in rows if step is not None), default=None),
            "optimizer_durable": durable,
        }

    # -- roles -----------------------------------------------------------------------------

    def acquire_role(self, role: str, holder: str) -> Fence:
        with self._mutation(None):
            self._db.execute(
                "INSERT INTO role VALUES (?, 1, ?) "
                "ON CONFLICT (name) DO UPDATE SET epoch = epoch + 1, holder = excluded.holder",
                (role, holder),
            )
            if role == "producer":
                self._db.execute("UPDATE task SET state = 'pending', holder = '' WHERE state = 'leased'")
            if role == "consumer":
                self._db.execute("DELETE FROM ack WHERE durable = 0")
            return Fence(role, self._value("SELECT epoch FROM role WHERE name = ?", role))

    def role_epochs(self) -> dict[str, int]:
        return dict(self._rows("SELECT name, epoch FROM role"))

    # -- prompt tasks ----------------------------------------------------------------------

    def add_tasks(self, task_ids: Sequence[str]) -> int:
        with self._mutation(None):
            before = self._value("SELECT count(*) FROM task")
            next_ordinal = before
            for task_id in task_ids:
                self._db.execute(
                    "INSERT OR IGNORE INTO task (ordinal, task_id) VALUES (?, ?)", (next_ordinal, task_id)
                )
                next_ordinal += self._db.changes()
            return int(next_ordinal - before)

    def lease_tasks(
        self, worker_id: str, limit: int, *, group_size: int | None = None, fence: Fence | None = None
    ) -> list[TaskLease]:
        with self._mutation(fence):
            rows = self._rows(
                "SELECT task_id, ordinal, attempt FROM task WHERE state = 'pending' ORDER BY ordinal LIMIT ?",
                limit,
            )
            if group_size is not None:
                rows = [row for row in rows if row[1] // group_size == rows[0][1] // group_size]
            self._db.executemany(
                "UPDATE task SET state = 'leased', holder = ? WHERE task_id = ?",
                [(worker_id, task_id) for task_id, _, _ in rows],
            )
            return [TaskLease(*row) for row in rows]

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
        with self._mutation(fence):
            for task_id in task_ids:
                state = self._value(
                    "UPDATE task SET attempt = attempt + 1, holder = '', reason = ?, "
                    "state = iif(attempt + 1 >= ?, 'failed', 'pending') "
                    "WHERE task_id = ? AND state = 'leased' AND holder = ? RETURNING state",
                    *(reason, limit, task_id, worker_id),
                )
                if state == "failed":
                    buried.append(task_id)
        return buried

    def task_counts(self) -> dict[str, int]:
        counts = dict.fromkeys(("pending", "leased", "done", "failed"), 0)
        counts.update(self._rows("SELECT state, count(*) FROM task GROUP BY state"))
        return counts

    def failed_tasks(self) -> dict[str, str]:
        return dict(self._rows("SELECT task_id, reason FROM task WHERE state = 'failed' ORDER BY ordinal"))

    # -- step plans ------------------------------------------------------------------------

    def record_plan(self, plan: StepPlan, *, fence: Fence | None = None) -> StepPlan:
        with self._mutation(fence):
            self._db.execute(
                "INSERT OR IGNORE INTO plan VALUES (?, ?, ?)",
                (plan.step, json.dumps(plan.sample_ids), plan.last_seq),
            )
            stored = self.get_plan(plan.step)
            assert stored is not None, "the plan was inserted in this transaction"
            return stored

    def get_plan(self, step: int) -> StepPlan | None:
        rows = self._rows("SELECT sample_ids, last_seq FROM plan WHERE step = ?", step)
        return StepPlan(step, tuple(json.loads(rows[0][0])), rows[0][1]) if rows else None

    # -- checkpoints -----------------------------------------------------------------------

    def record_checkpoint(self, checkpoint: CheckpointRecord, *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            head = self._head_step()
            if checkpoint.step <= head:
                raise behind_head(checkpoint.step, head)
            self._db.execute(
                "INSERT INTO checkpoint VALUES (?, ?, ?, ?)",
                (checkpoint.step, checkpoint.name, checkpoint.manifest_digest, checkpoint.last_seq),
            )
            self._db.execute("UPDATE ack SET durable = 1 WHERE durable = 0 AND step <= ?", (checkpoint.step,))

    def _head_step(self) -> int:
        return int(self._value("SELECT coalesce(max(step), -1) FROM checkpoint"))

    def checkpoints(self) -> list[CheckpointRecord]:
        rows = self._rows("SELECT step, name, manifest_digest, last_seq FROM checkpoint ORDER BY step")
        return [CheckpointRecord(*row) for row in rows]

    def forget_checkpoint(self, step: int, *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            if step == self._head_step():
                raise head_is_kept(step)
            self._db.execute("DELETE FROM checkpoint WHERE step = ?", (step,))

    def fall_back(self, step: int, *, fence: Fence | None = None) -> list[str]:
        with self._mutation(fence):
            lost = self._rows(
                "SELECT sample_id FROM sample JOIN ack USING (sample_id) "
                "WHERE state = 'released' AND step > ? ORDER BY seq",
                step,
            )
            self._db.execute("DELETE FROM checkpoint WHERE step > ?", (step,))
            self._db.execute("DELETE FROM ack WHERE step > ?", (step,))
            self._lose(i for (i,) in lost)
            return [i for (i,) in lost]

    # -- features --------------------------------------------------------------------------

    def releasable(self, limit: int) -> list[str]:
        rows = self._rows(
            "SELECT sample_id FROM sample JOIN ack USING (sample_id) "
            "WHERE state = 'present' AND state != 'released' AND durable = 1 ORDER BY seq LIMIT ?",
            limit,
        )
        return [row[0] for row in rows]

    def record_released(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            early = [
                i
                for i in sample_ids
                if not self._value(
                    "SELECT durable FROM ack JOIN sample USING (sample_id) WHERE sample_id = ?", i
                )
            ]
            if early:
                raise not_covered(early)
            self._set_state("released", sample_ids)

    def _set_state(self, state: str, sample_ids: Iterable[str]) -> None:
        self._db.executemany(
            "UPDATE sample SET state = ? WHERE sample_id = ?", [(state, i) for i in sample_ids]
        )

    def report_lost(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            durable = "SELECT durable FROM ack WHERE sample_id = ?"
            self._lose(i for i in sample_ids if not self._value(durable, i))

    def _lose(self, sample_ids: Iterable[str]) -> None:
        for sample_id in sample_ids:
            self._set_state("lost", [sample_id])
            self._db.execute(
                "UPDATE task SET state = 'pending', holder = '' WHERE state != 'failed' "
                "AND task_id = (SELECT task_id FROM sample WHERE sample_id = ?)",
                (sample_id,),
            )

    def present_ids(self) -> list[str]:
        return self._ids_in("present")

    def lost_ids(self) -> list[str]:
        return self._ids_in("lost")

    def _ids_in(self, state: str) -> list[str]:
        rows = self._rows(
            "SELECT sample_id FROM sample WHERE state = ? AND state != 'released' ORDER BY seq", state
        )
        return [row[0] for row in rows]

    def usage(self) -> LedgerUsage:
        [row] = self._rows(
            "SELECT count(*) FILTER (WHERE state = 'present'), "
            "coalesce(sum(bytes) FILTER (WHERE state = 'present'), 0), "
            "count(*) FILTER (WHERE state = 'present' AND durable = 0), "
            "coalesce(sum(bytes) FILTER (WHERE state = 'present' AND durable = 0), 0), "
            "count(*) FILTER (WHERE durable IS NULL) "
            "FROM sample LEFT JOIN ack USING (sample_id) WHERE state != 'released'"
        )
        return LedgerUsage(*row)

    def compact(self) -> int:
        with self._mutation(None):
            rows = self._rows(
                "SELECT seq, ref FROM sample WHERE state = 'released' AND NOT compacted LIMIT 10000"
            )
            small = [(ref_to_json(compacted(ref_from_json(ref))), seq) for seq, ref in rows]
            self._db.executemany("UPDATE sample SET ref = ?, compacted = 1 WHERE seq = ?", small)
            self._db.execute("DELETE FROM plan WHERE step <= (SELECT coalesce(min(step), 0) FROM checkpoint)")
            return len(small)

    # -- run -------------------------------------------------------------------------------

    def set_facts(self, facts: Mapping[str, Any], *, fence: Fence | None = None) -> None:
        rows = [(key, json.dumps(value)) for key, value in facts.items()]
        with self._mutation(fence):
            self._db.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?)", rows)

    def facts(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._rows("SELECT key, value FROM fact")}

    def lsn(self) -> int:
        return int(self._value("SELECT lsn FROM run"))

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        deadline = monotonic() + timeout_s
        with self._bell.listen() as listener:
            while (lsn := self.lsn()) == seen_lsn and (left := deadline - monotonic()) > 0:
                listener.wait(left)
        return lsn

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._db.close()
                self._gate.close()
