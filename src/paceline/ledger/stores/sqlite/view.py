"""SQLiteView reads a ledger without holding a role and without writing.

It takes no lock that a writer waits for, creates no file and migrates nothing, so it works on a live run,
on a crashed one, on a read-only disk, and as another user with read permission. Every question opens the
file again, because the files that exist at that moment decide how it must be opened.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import apsw

from paceline.errors import ConfigError, LedgerError, LedgerMissingError, SchemaError
from paceline.ledger.filesystem import regular_file
from paceline.ledger.records import SampleRecord, Snapshot, State, TrainedStep
from paceline.ledger.stores.sqlite.database import UNUSABLE, damaged
from paceline.ledger.stores.sqlite.ledger import SQLiteLedger
from paceline.ledger.stores.sqlite.schema import known_version

TRIES = 5  # a writer may come or go between two looks at the files
BUSY_MS = 10_000
T = TypeVar("T")


class SQLiteView:
    def __init__(self, path: Path) -> None:
        """Raises ConfigError if there is no ledger, SchemaError if the file is not one."""
        self.path = path
        self._ask(lambda ledger: ledger.lsn())

    # -- questions -------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return self._ask(lambda ledger: ledger.snapshot())

    def facts(self) -> dict[str, Any]:
        return self._ask(lambda ledger: ledger.facts())

    def find(
        self, sample_ids: Sequence[str] | None = None, *, state: State | None = None
    ) -> dict[str, SampleRecord]:
        return self._ask(lambda ledger: ledger.find(sample_ids, state=state))

    def failed(self) -> dict[int, str]:
        """Failed prompts by ordinal, and the reason of each."""
        return self._ask(lambda ledger: ledger.failed())

    def history(self, *, step: int | None = None, sample_id: str | None = None) -> list[TrainedStep]:
        """That step, or the steps that contain the sample; archived ones too."""
        return self._ask(lambda ledger: list(ledger.history(step=step, sample_id=sample_id)))

    def close(self) -> None:
        """It keeps nothing open between two questions."""

    # -- opening ---------------------------------------------------------------------------

    def _ask(self, question: Callable[[SQLiteLedger], T]) -> T:
        for tries_left in reversed(range(TRIES)):
            before = self._stamp()
            try:
                with self._opened() as (ledger, at_rest):
                    answer = question(ledger)
            except (*UNUSABLE, apsw.CorruptError, apsw.NotADBError, LedgerError) as error:
                if isinstance(error, (SchemaError, ConfigError)) and before == self._stamp():
                    raise
                if not tries_left:
                    raise self._unreadable(error) from error
                continue
            if not at_rest or self._stamp() == before:
                return answer
        raise self._unreadable("it keeps changing although no process has it open")

    def _stamp(self) -> tuple[int, int, int] | None:
        found = regular_file(self.path)
        return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)

    @contextmanager
    def _opened(self) -> Iterator[tuple[SQLiteLedger, bool]]:
        """The ledger, and whether it was read as a file that no process writes to."""
        found = regular_file(self.path)
        if found is None:
            raise LedgerMissingError(
                f"There is no ledger at {self.path}.",
                why="A run exists from its first start on.",
                next="paceline train RUN.yaml",
            )
        if found.st_size == 0 and regular_file(self._log) is None:
            raise SchemaError(
                f"{self.path} is empty.",
                why="The run has not begun, or its ledger was cut off; nothing was changed.",
                next="restore it from a backup, or remove it and start the run.",
            )
        # A process that has the ledger open keeps a log beside it; without a log the file is complete.
        at_rest = regular_file(self._log) is None
        if at_rest:
            with _connected(self.path, "immutable=1") as ledger:
                yield ledger, True
            return
        try:
            db = _connect(self.path, "readonly_shm=1")
        except (apsw.CantOpenError, apsw.ReadOnlyError, apsw.IOError):
            db = None  # the writer was killed, and the log's index is gone or cannot be created
        if db is None:
            with tempfile.TemporaryDirectory(prefix="paceline-view-") as folder:
                copy = Path(folder) / self.path.name
                for name in (self.path, self._log):
                    shutil.copyfile(name, copy.with_name(name.name))
                with _connected(copy, "") as ledger:
                    yield ledger, True
            return
        try:
            yield _reader(db, self.path), False
        finally:
            db.close()

    @property
    def _log(self) -> Path:
        return self.path.with_name(self.path.name + "-wal")

    def _unreadable(self, error: object) -> LedgerError:
        if isinstance(error, (apsw.CorruptError, apsw.NotADBError)):
            return damaged(self.path, error)
        return LedgerError(
            f"{self.path} cannot be read ({error}).",
            why="Nothing was changed.",
            next="check the disk and its permissions, then run the same command again.",
        )


def _connect(path: Path, option: str) -> apsw.Connection:
    # Quoted: a path may hold any character.
    uri = f"file:{quote(str(path.resolve()))}?mode={'ro' if option else 'rw'}&{option}"
    flags = apsw.SQLITE_OPEN_URI | (apsw.SQLITE_OPEN_READONLY if option else apsw.SQLITE_OPEN_READWRITE)
    db = apsw.Connection(uri, flags=flags)
    try:
        db.set_busy_timeout(BUSY_MS)
        db.execute("SELECT 1 FROM sqlite_schema LIMIT 1")  # looks at the files
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _connected(path: Path, option: str) -> Iterator[SQLiteLedger]:
    db = _connect(path, option)
    try:
        yield _reader(db, path)
    finally:
        db.close()


def _reader(db: apsw.Connection, path: Path) -> SQLiteLedger:
    """A ledger over a connection that only reads."""
    if known_version(db, path) is None:
        raise SchemaError(f"{path} is an empty database.", next="restore it from a backup.")
    ledger = SQLiteLedger.__new__(SQLiteLedger)
    ledger.read_from(db, path)
    return ledger
