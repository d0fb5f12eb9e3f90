"""One SQLite file as every process of a run opens it: transactions, fences, op ids, durability.

WAL. Writers of all processes queue at a gate (see ledger/gate.py), take BEGIN IMMEDIATE, and either
commit whole or roll back whole; an error leaves no open transaction behind. What a call committed
survives `kill -9` always. Power loss: with durability "full" every call; with "head" every call
before the last one that durable weights depend on (a checkpoint, a role change, a fall back, a
quarantine): later ones may vanish, from the end backwards. Such a call returns once the log is synced,
by it or by another process that synced at that moment (see group_sync.py). An I/O error of a commit
or a sync is final for this object: what the disk holds is unknown then, and whoever opens it next
writes it again. apsw carries its own SQLite,
because versions before 3.51.3 can corrupt a write-ahead log with two connections.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import apsw
import msgspec

from paceline.crashpoints import reach
from paceline.durable_files import make_folder
from paceline.errors import LedgerError, SchemaError, UnknownResultError
from paceline.ledger.bell import Bell
from paceline.ledger.gate import WriterGate, refuse_network_filesystem
from paceline.ledger.records import Fence
from paceline.ledger.refusals import fenced
from paceline.ledger.stores.sqlite.group_sync import GroupSync
from paceline.ledger.stores.sqlite.page_checksums import RESERVED_BYTES, checksum_layer, refuse_unchecked
from paceline.ledger.stores.sqlite.run_row import READ, READ_TO_CHANGE, WRITE, RunRow
from paceline.ledger.stores.sqlite.schema import open_schema

Durability = Literal["full", "head"]
SQLITE_FLOOR = (3, 51, 3)
SQLITE_BACKPORTS = ((3, 44, 6), (3, 50, 7))
OPS_KEPT = 4096
OPS_AT_ONCE = 1024  # older ones are dropped together: one page of a commit less
BUSY_MS = 60_000


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


UNUSABLE = (
    apsw.IOError,
    apsw.BusyError,
    apsw.ReadOnlyError,
    apsw.CantOpenError,
    apsw.ProtocolError,
    apsw.LockedError,
    OSError,
)


class Errors:
    """`with` it: an error on the way out is shown to `raise_better`, which may raise another.

    A class, because every call of the ledger passes through and a generator takes three times as long.
    """

    def __init__(self, raise_better: Callable[[BaseException], None]) -> None:
        self._raise_better = raise_better

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> None:
        if error is not None:
            self._raise_better(error)


class Operation:
    """One call with an op id: what its first try returned, if there was one, as JSON."""

    def __init__(self, op_id: str | None, stored: str | None) -> None:
        self.op_id = op_id
        self.repeated = stored is not None
        self.result: Any = None if stored is None else msgspec.json.decode(stored)
        self.kept: Any = None

    def keep(self, result: Any) -> None:
        self.kept = result


class Database:
    def __init__(self, path: str | os.PathLike[str], durability: Durability, vfs: str | None) -> None:
        check_sqlite_version(apsw.sqlite_lib_version())
        self.path = Path(path)
        self._durability = durability
        self._lock = threading.RLock()
        self._closed = False
        self._broken = ""
        self._now: RunRow | None = None  # of the open transaction, if it changes the ledger
        self._explained, self._final_errors = Errors(self._explain), Errors(self._fail_for_good)
        with self._lock, self._explained, ExitStack() as opened:
            make_folder(self.path.parent)
            refuse_network_filesystem(self.path.parent)
            self._bell = Bell(self.path.with_name(self.path.name + "-bell"))
            gate = self.path.with_name(self.path.name + "-gate")
            opened.callback(self._bell.close)
            self._gate = WriterGate(gate)
            opened.callback(self._gate.close)
            self._group_sync = GroupSync(gate, self._sync_log)
            opened.callback(self._group_sync.close)
            with self._group_sync.alone, self._gate:
                self._open(vfs, opened)
            opened.pop_all()

    def _open(self, vfs: str | None, opened: ExitStack) -> None:
        """With the writers' gate held and no sync under way. `opened`: what is closed if it fails."""
        refuse_unchecked(self.path)
        self._db = apsw.Connection(str(self.path), vfs=vfs or checksum_layer())
        opened.callback(self._db.close)
        self._db.set_busy_timeout(BUSY_MS)
        if vfs is not None:  # such file layers have no shared memory; one process alone then
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        elif checksum_layer() is not None:
            self._db.reserve_bytes(None, RESERVED_BYTES)  # of a new database
        open_schema(self._db, self.path)
        self._db.execute("PRAGMA synchronous=NORMAL")  # a commit itself syncs nothing
        # The log is open before anybody can fail to sync it: the kernel tells nobody who comes later.
        self._db.execute("SELECT 1 FROM sqlite_schema LIMIT 1")  # makes the file, if there was none
        flags = apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_READWRITE
        self._log = apsw.VFSFile(vfs or "unix", f"{self.path}-wal", [flags, 0])
        opened.callback(self._log.xClose)
        self._group_sync.enter(self.path, self._write_again)

    # -- transactions ----------------------------------------------------------------------

    @contextmanager
    def _mutation(
        self, fence: Fence | None, op_id: str | None = None, *, final: bool = False
    ) -> Iterator[Operation]:
        """One transaction. `final`: durable weights depend on it, so it is on the disk on return."""
        is_synced = final or self._durability == "full"
        with self._lock, self._explained:
            if self._closed:
                raise self._is_closed()
            with self._gate:
                self._refuse_broken()
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    reach("ledger.after_begin")
                    operation, self._now = self._begun(fence, op_id)
                    lsn = self._now.lsn
                    yield operation
                    if not operation.repeated:
                        lsn = self._now.lsn = lsn + 1
                        self._commit(self._now, operation)
                        if is_synced:
                            self._group_sync.announce(lsn)
                finally:
                    self._now = None
                    if self._db.in_transaction:  # a repeated operation, or an error
                        self._db.execute("ROLLBACK")
            if not operation.repeated:
                reach("ledger.after_commit")
                self._bell.ring()
            if is_synced:
                with self._final_errors:
                    self._group_sync.wait_for(lsn)
                reach("ledger.after_sync")

    def _begun(self, fence: Fence | None, op_id: str | None) -> tuple[Operation, RunRow]:
        role = None if fence is None else fence.role
        [(epoch, result, *columns)] = self._db.execute(READ_TO_CHANGE, (role, op_id))
        operation = Operation(op_id, result)
        if not operation.repeated:
            self._check_fence(fence, epoch or 0)
        return operation, RunRow(*columns)

    @staticmethod
    def _check_fence(fence: Fence | None, epoch: int) -> None:
        if fence is not None and epoch != fence.epoch:
            raise fenced(fence, epoch)

    def _commit(self, run: RunRow, operation: Operation) -> None:
        self._db.execute(WRITE, run.values())
        if operation.op_id is not None:
            result = msgspec.json.encode(operation.kept).decode()
            self._db.execute("INSERT INTO operation VALUES (?, ?, ?)", (operation.op_id, run.lsn, result))
        if run.lsn % OPS_AT_ONCE == 0:
            self._db.execute("DELETE FROM operation WHERE lsn < ?", (run.lsn - OPS_KEPT,))
        reach("ledger.before_commit")
        with self._final_errors:
            self._db.execute("COMMIT")

    def _sync_log(self) -> None:
        """Bring the write-ahead log to the disk, through the same file layer that writes it."""
        self._log.xSync(apsw.SQLITE_SYNC_NORMAL | apsw.SQLITE_SYNC_DATAONLY)

    def _write_again(self, noted: int) -> None:
        """Bring the log's content into the database: what it holds may never have reached the disk."""
        if self.lsn() < noted:
            raise SchemaError(
                f"{self.path} ends at change {self.lsn()}, but change {noted} was on the disk.",
                why="Its write-ahead log is damaged, or an older copy lies in its place.",
                next=f"`paceline fsck {self.path.parent}` says what is left; to go on from there, remove "
                f"{self._gate.path} and run the same command again: what is missing is captured again.",
            )
        [[busy, *_]] = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise LedgerError(
                f"The log of {self.path} was not synced and cannot be written again while others read it.",
                why="What it holds might not survive a power failure.",
                next="stop every process of this run, then run the same command again.",
            )

    def _fail_for_good(self, error: BaseException) -> None:
        if isinstance(error, (apsw.IOError, apsw.CorruptError, apsw.CantOpenError, OSError)):
            self._broken = str(error)
            raise UnknownResultError(
                f"{self.path} could not be synced ({error}); whether the last change is on disk is unknown.",
                why="After a failed fsync nothing this process wrote may be trusted to be on the disk.",
                next="check the disk, then run the same command again: it reads what is really there.",
            ) from error

    def _refuse_broken(self) -> None:
        if self._broken:
            raise LedgerError(
                f"{self.path} failed to sync before ({self._broken}); this process stopped writing to it.",
                why="What is on the disk is unknown until the file is opened again.",
                next="check the disk, then run the same command again.",
            )

    def _explain(self, error: BaseException) -> None:
        """Turn what SQLite says into what the user can do."""
        if isinstance(error, apsw.FullError):
            raise LedgerError(
                f"The disk of {self.path} is full ({error}).",
                why="The change was rolled back; everything committed before is safe.",
                next="free space on that disk and run the same command again.",
            ) from error
        checksum_differs = getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_DATA
        if checksum_differs or isinstance(error, (apsw.CorruptError, apsw.NotADBError)):
            raise self._damaged(error) from error
        if isinstance(error, UNUSABLE):
            raise LedgerError(
                f"{self.path} cannot be read or written ({error}).",
                why="The change was rolled back; everything committed before is safe.",
                next="check the disk and its permissions, then run the same command again.",
            ) from error
        if isinstance(error, apsw.ConnectionClosedError):
            raise self._is_closed() from error

    def _is_closed(self) -> LedgerError:
        return LedgerError(f"{self.path} is closed.", next="open a new SQLiteMetadataStore.")

    def _damaged(self, error: BaseException) -> SchemaError:
        return SchemaError(
            f"{self.path} is damaged or no database ({error}).",
            why="The ledger cannot be trusted, so nothing was changed.",
            next=f"`paceline fsck {self.path.parent}` tells what is wrong and what to do.",
        )

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            if not self._closed and self._db.in_transaction:  # whoever began it explains its errors
                return list(self._db.execute(sql, values))
            with self._explained:
                return list(self._db.execute(sql, values))

    def _value(self, sql: str, *values: Any) -> Any:
        rows = self._rows(sql, *values)
        return rows[0][0] if rows else None

    def _change(self, sql: str, *values: Any) -> int:
        """Run a statement in the open transaction; how many rows it changed."""
        self._db.execute(sql, values)
        return self._db.changes()

    def lsn(self) -> int:
        return int(self._value("SELECT lsn FROM run"))

    def _run(self) -> RunRow:
        """The counters; in a change the ones it may set."""
        with self._lock:
            return self._now or RunRow(*self._rows(READ)[0])

    def close(self) -> None:
        with self._lock, self._explained, ExitStack() as closing:
            if not self._closed:
                self._closed = True
                for part in (
                    self._bell.close,
                    self._gate.close,
                    self._group_sync.close,
                    self._db.close,
                    self._log.xClose,
                ):
                    closing.callback(part)  # the last one first, and each even if one fails
