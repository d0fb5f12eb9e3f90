"""One SQLite file as every process of a run opens it: transactions, fences, operations, durability.

The database is in WAL mode. The writers of all processes queue at a gate (ledger/gate.py) and take BEGIN
IMMEDIATE; a transaction commits whole or rolls back whole.

A call that returned survives `kill -9`. With durability "full" it also survives power loss. With "head"
only calls that durable weights depend on (a checkpoint, a role change, a fall back, a quarantine, a failed
prompt) and everything before them survive; later calls may vanish, from the end backwards. Such a call
commits with synchronous=FULL, which syncs the whole log.

An I/O error of a commit is final for this object, because the content of the disk is unknown then. The
process leaves a mark beside the file; the next process to open it writes the log's content into the
database before it reads, since the kernel may keep pages that it failed to write. apsw brings its own
SQLite: versions before 3.51.3 can corrupt a write-ahead log that has two connections.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_type_hints

import apsw
import msgspec

from paceline.crashpoints import reach
from paceline.durable_files import make_folder
from paceline.errors import LedgerError, SchemaError, UnknownResultError
from paceline.ledger.filesystem import refuse_network_filesystem, regular_file
from paceline.ledger.gate import NoGate, WriterGate
from paceline.ledger.records import Fence
from paceline.ledger.refusals import fenced, late
from paceline.ledger.stores.sqlite.run_row import READ, READ_TO_CHANGE, WRITE, RunRow
from paceline.ledger.stores.sqlite.schema import known_version, open_schema

Durability = Literal["full", "head"]
IN_MEMORY = ":memory:"  # a ledger private to this object
SQLITE_FLOOR = (3, 51, 3)
SQLITE_BACKPORTS = ((3, 44, 6), (3, 50, 7))
BUSY_MS = 60_000


def check_sqlite_version(version: str) -> None:
    """Raise SchemaError for a SQLite that may carry the WAL-reset bug (fixed in 3.51.3)."""
    number = tuple(int(part) for part in version.split(".")[:3])
    fixed = number >= SQLITE_FLOOR or any(number[:2] == b[:2] and number >= b for b in SQLITE_BACKPORTS)
    if not fixed:
        raise SchemaError(
            f"SQLite {version} may corrupt a write-ahead log that two processes write.",
            why="The guarantee rests on the ledger.",
            next="pip install --upgrade 'apsw>=3.54.1.0'",
        )


def refuse_place(path: Path) -> None:
    """Raise what opening a ledger there would raise for its library, file or filesystem; change nothing."""
    check_sqlite_version(apsw.sqlite_lib_version())
    regular_file(path)
    refuse_network_filesystem(path.parent)


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
    """A context manager that passes an error to `raise_better`, which may raise another one.

    It is a class because every ledger call uses it, and a generator takes three times as long.
    """

    def __init__(self, raise_better: Callable[[BaseException], None]) -> None:
        self._raise_better = raise_better

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> None:
        if error is not None:
            self._raise_better(error)


@dataclass
class Operation:
    """One change. `result`: what it returned, as JSON; given if it repeats the last one."""

    worker: str  # the producer that makes it; "" for any other caller
    run: RunRow
    result: bytes | None
    changes: bool = True


D = TypeVar("D", bound="Database")
P = ParamSpec("P")
T = TypeVar("T")


def change(
    *, final: bool = False, final_if: str = ""
) -> Callable[[Callable[Concatenate[D, P], T]], Callable[Concatenate[D, Fence | None, P], T]]:
    """Make a method one transaction, called with a fence first. A repetition returns the recorded result.

    `final`: durable weights depend on it, so it is synced on return; `final_if`: if this argument is given.
    """

    def decorate(method: Callable[Concatenate[D, P], T]) -> Callable[Concatenate[D, Fence | None, P], T]:
        kind = get_type_hints(method)["return"]

        @wraps(method)
        def call(self: D, fence: Fence | None, /, *args: P.args, **kwargs: P.kwargs) -> T:
            syncs = final or kwargs.get(final_if) not in (None, False)
            with self._mutation(fence, final=syncs) as operation:
                if operation.result is not None:
                    repeated: T = msgspec.json.decode(operation.result, type=kind)
                    return repeated
                result = method(self, *args, **kwargs)
                operation.result = msgspec.json.encode(result)
                return result

        return call

    return decorate


class Database:
    _gate: WriterGate | NoGate = NoGate()

    def __init__(self, path: str | os.PathLike[str], durability: Durability, vfs: str | None) -> None:
        check_sqlite_version(apsw.sqlite_lib_version())
        self._prepare(Path(path), durability)
        with self._lock, self._explained, ExitStack() as opened:
            if str(path) == IN_MEMORY:
                self._db = apsw.Connection(IN_MEMORY)
                open_schema(self._db, self.path)
                return
            if regular_file(self.path) is None:
                make_folder(self.path.parent)
            refuse_network_filesystem(self.path.parent)
            gate = self._gate = WriterGate(self.path.with_name(self.path.name + "-gate"))
            opened.callback(gate.close)
            with gate:
                self._open(vfs, opened)
            opened.pop_all()

    def _prepare(self, path: Path, durability: Durability) -> None:
        self.path = path
        self._durability = durability
        self._lock = threading.RLock()
        self._closed = False
        self._broken: tuple[str, Fence | None] | None = None  # why, and in which call
        self._now: Operation | None = None  # of the open transaction, if it changes the ledger
        self._inode: tuple[int, int] | None = None  # of the file; None: no other process can replace it
        self._syncs = False
        self._explained, self._final_errors = Errors(self._explain), Errors(self._fail_for_good)

    def read_from(self, db: apsw.Connection, path: Path) -> None:
        """For a view: read over this connection, which belongs to the caller."""
        self._prepare(path, "head")
        self._db = db

    def _open(self, vfs: str | None, opened: ExitStack) -> None:
        """Open the file; the caller holds the gate. `opened`: what is closed on failure."""
        is_new = not self.path.exists()
        if vfs is None and is_new:
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self._db = apsw.Connection(str(self.path), vfs=vfs)
        opened.callback(self._db.close)
        self._db.set_busy_timeout(BUSY_MS)
        if (
            vfs is not None
        ):  # file layers of tests have no shared memory, so only one process can open the file
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        known_version(self._db, self.path)  # before anything is written to another program's database
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        open_schema(self._db, self.path)
        self._write_again()
        self._db.execute("PRAGMA synchronous=NORMAL")  # a commit syncs nothing
        if vfs is None:
            self._inode = self._inode_now()
            self._refuse_shorter(is_new)

    def _refuse_shorter(self, is_new: bool) -> None:
        """SQLite ends a log at the first damaged frame, and takes what follows for never written."""
        assert isinstance(self._gate, WriterGate), "of a file"
        assert self._inode is not None, "it is open"
        noted = 0 if is_new else self._gate.noted(self._inode[1])
        lsn = self.lsn()
        if lsn < noted:
            raise SchemaError(
                f"{self.path} ends at change {lsn}, but change {noted} was on the disk.",
                why="Its write-ahead log is damaged, or an older copy lies in its place.",
                next=f"`paceline fsck {self.path.parent}` says what is left; to go on from there, remove "
                f"{self._gate.path} and run the same command again: what is missing is captured again.",
            )
        if is_new:
            self._gate.note(0, self._inode[1])

    def _inode_now(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)  # noqa: PTH116 (a third of the time, and before every change)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _refuse_replaced(self) -> None:
        """Raise LedgerError if the path no longer names the open file: its content would be lost."""
        if self._inode is not None and self._inode_now() != self._inode:
            raise LedgerError(
                f"{self.path} was deleted or replaced while this process had it open.",
                why="What this process records in the old file would be lost, and with it what was trained.",
                next="stop every process of this run, put the ledger back (a copy of it, or a backup), and "
                "run the same command again: it goes on from the newest checkpoint that it knows.",
            )

    # -- disk errors -----------------------------------------------------------------------

    @property
    def _mark(self) -> Path:
        """The file that a process leaves after it failed to sync the log."""
        return self.path.with_name(self.path.name + "-unsynced")

    def _write_again(self) -> None:
        """Write the log's content into the database, if a process failed to sync the log."""
        if not self._mark.exists():
            return
        [[busy, *_]] = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise LedgerError(
                f"The log of {self.path} was not synced and cannot be written again while others read it.",
                why="What it holds might not survive a power failure.",
                next="stop every process of this run, then run the same command again.",
            )
        self._mark.unlink(missing_ok=True)

    def _fail_for_good(self, error: BaseException) -> None:
        if isinstance(error, (apsw.IOError, apsw.CorruptError, apsw.CantOpenError, OSError)):
            self._broken = str(error), None
            with suppress(OSError):
                self._mark.touch(0o600)
            raise UnknownResultError(
                f"{self.path} could not be synced ({error}); whether the last change is on disk is unknown.",
                why="After a failed fsync nothing that this process wrote is certain to be on the disk.",
                next="check the disk, then run the same command again: it reads what is really there.",
            ) from error

    def _refuse_broken(self, fence: Fence | None = None) -> None:
        if self._broken is None:
            return
        why, failed = self._broken
        is_repeated = fence is not None and fence.op is not None and fence == failed
        raise (UnknownResultError if is_repeated else LedgerError)(
            f"{self.path} failed to sync earlier ({why}); this process stopped writing to it.",
            why="What is on the disk is unknown until the file is opened again.",
            next="check the disk, then run the same command again.",
        )

    # -- transactions ----------------------------------------------------------------------

    @contextmanager
    def _mutation(self, fence: Fence | None, *, final: bool = False) -> Iterator[Operation]:
        """One transaction; rolled back if the call is repeated, changes nothing, or raises."""
        with self._lock, self._explained:
            if self._closed:
                raise self._is_closed()
            with self._gate:
                self._refuse_broken(fence)
                self._refuse_replaced()
                self._sync_commits(final or self._durability == "full")
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    reach("ledger.after_begin")
                    operation = self._now = self._begun(fence)
                    commits = operation.result is None
                    yield operation
                    commits = commits and operation.changes
                    if commits:
                        self._commit(operation, fence)
                finally:
                    self._now = None
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
            if commits:
                reach("ledger.after_commit")
                if self._syncs:
                    reach("ledger.after_sync")

    @property
    def _worker(self) -> str:
        """The producer that makes the open change; "" for any other caller."""
        assert self._now is not None, "in a change"
        return self._now.worker

    def _unchanged(self, result: T) -> T:
        """Change nothing after all."""
        assert self._now is not None, "in a change"
        self._now.changes = False
        return result

    def _sync_commits(self, syncs: bool) -> None:
        if syncs != self._syncs:
            self._db.execute(f"PRAGMA synchronous={'FULL' if syncs else 'NORMAL'}")
            self._syncs = syncs

    def _begun(self, fence: Fence | None) -> Operation:
        role = None if fence is None else fence.role
        [(epoch, last_op, result, *columns)] = self._db.execute(READ_TO_CHANGE, (role,))
        repeats = False
        if fence is not None:
            self._check_fence(fence, epoch or 0)
            if fence.op is not None and fence.op < last_op:
                raise late(fence, last_op)
            repeats = fence.op == last_op
        worker = "" if fence is None else fence.worker
        return Operation(worker, RunRow(*columns), result.encode() if repeats else None)

    @staticmethod
    def _check_fence(fence: Fence, epoch: int) -> None:
        if fence.epoch != epoch:
            raise fenced(fence, epoch)

    def _commit(self, operation: Operation, fence: Fence | None) -> None:
        run, result = operation.run, (operation.result or b"null").decode()
        run.lsn += 1
        self._db.execute(WRITE, run.values())
        if fence is not None and fence.op is not None:
            self._db.execute(
                "UPDATE role SET last_op = ?, result = ? WHERE name = ?", (fence.op, result, fence.role)
            )
        reach("ledger.before_commit")
        try:
            with self._final_errors:
                self._db.execute("COMMIT")
        except UnknownResultError:
            assert self._broken is not None, "set a moment ago"
            self._broken = self._broken[0], fence
            raise
        if self._syncs and self._inode is not None:
            self._gate.note(run.lsn, self._inode[1])

    def _explain(self, error: BaseException) -> None:
        """Turn SQLite's error into one with advice."""
        if isinstance(error, apsw.FullError):
            raise LedgerError(
                f"The disk of {self.path} is full ({error}).",
                why="The change was rolled back; everything committed before is safe.",
                next="free space on that disk and run the same command again.",
            ) from error
        if isinstance(error, (apsw.CorruptError, apsw.NotADBError)):
            raise damaged(self.path, error) from error
        if isinstance(error, UNUSABLE):
            raise LedgerError(
                f"{self.path} cannot be read or written ({error}).",
                why="The change was rolled back; everything committed before is safe.",
                next="check the disk and its permissions, then run the same command again.",
            ) from error
        if isinstance(error, apsw.ConnectionClosedError):
            raise self._is_closed() from error

    def _is_closed(self) -> LedgerError:
        return LedgerError(f"{self.path} is closed.", next="open it again.")

    # -- reading ---------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Make several reads see one state of the ledger."""
        with self._lock, self._explained:
            if self._closed:
                raise self._is_closed()
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                if self._db.in_transaction:  # an error may have ended it
                    self._db.execute("ROLLBACK")

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            if not self._closed and self._db.in_transaction:  # the outer call explains errors
                return list(self._db.execute(sql, values))
            with self._explained:
                return list(self._db.execute(sql, values))

    def _value(self, sql: str, *values: Any) -> Any:
        rows = self._rows(sql, *values)
        return rows[0][0] if rows else None

    def _change(self, sql: str, *values: Any) -> int:
        """Run a statement in the open transaction; returns how many rows it changed."""
        self._db.execute(sql, values)
        return self._db.changes()

    def lsn(self) -> int:
        self._refuse_replaced()
        return int(self._value("SELECT lsn FROM run"))

    def _run(self) -> RunRow:
        """The counters; inside a change, the object that it may set."""
        with self._lock:
            return RunRow(*self._rows(READ)[0]) if self._now is None else self._now.run

    def close(self) -> None:
        with self._lock, self._explained, ExitStack() as closing:
            if not self._closed:
                self._closed = True
                closing.callback(self._gate.close)  # in reverse order, and each even if one fails
                closing.callback(self._db.close)


def damaged(path: Path, error: BaseException) -> SchemaError:
    return SchemaError(
        f"{path} is damaged or not a database ({error}).",
        why="The ledger cannot be trusted, so nothing was changed.",
        next=f"`paceline fsck {path.parent}` says what is wrong and what to do.",
    )
