"""Where ledger and features of a simulated run lie, and how a power failure takes changes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from paceline.features.store import FeatureStore
from paceline.ledger.ledger import Ledger
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.ledger_subjects import RedisSubject
from paceline.testing.light_adapters import InMemoryLightFeatureStore
from paceline.testing.specification import copied
from paceline.testing.specification_of_steps import SpecificationLedger
from paceline.testing.valkey_server import ValkeyServer

ARCHIVE_FROM = 4  # samples or steps, so that runs this small have an archive


class SimulatedStore(FeatureStore, Protocol):
    """A feature store in this process, and what happens to it."""

    def generations(self) -> dict[str, int]: ...

    def lose(self, sample_id: str) -> None: ...

    def damage(self, sample_id: str) -> None: ...

    def wipe(self, uri: str) -> None: ...


class Place(Protocol):
    def features(self, budget_bytes: int) -> SimulatedStore:
        """A new, empty store."""

    def open(self) -> Ledger:
        """The ledger that lies there, or a new one."""

    def copy(self, ledger: Ledger) -> Any:
        """What is there now."""

    def put_back(self, copy: Any) -> None:
        """Instead of what is there; the ledger is closed."""


class InMemory:
    """The specification is the ledger, and features are strings of bytes."""

    def __init__(self) -> None:
        self._rows: Any = None

    def features(self, budget_bytes: int) -> SimulatedStore:
        return InMemoryLightFeatureStore(budget_bytes)

    def open(self) -> SpecificationLedger:
        ledger = SpecificationLedger()
        ledger.archive_from = ARCHIVE_FROM
        if self._rows is not None:
            ledger.rows = self._rows
        return ledger

    def copy(self, ledger: Ledger) -> Any:
        assert isinstance(ledger, SpecificationLedger)
        return copied(ledger.rows)

    def put_back(self, copy: Any) -> None:
        self._rows = copied(copy)


class InFiles:
    """A SQLite ledger with its real files in a folder, and tensors in their codec's form."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ledger.db"

    def features(self, budget_bytes: int) -> SimulatedStore:
        from paceline.testing.tensor_features import TensorFeatureStore  # torch, which other runs do not need

        return TensorFeatureStore(budget_bytes)

    def open(self) -> SQLiteLedger:
        ledger = SQLiteLedger(self._path, durability="head")
        ledger._db.execute("PRAGMA wal_autocheckpoint=0")  # a copy of the log is a copy of the ledger
        ledger.archive_from = ARCHIVE_FROM
        return ledger

    def copy(self, ledger: Ledger) -> Any:
        files = (self._path, self._path.with_name("ledger.db-wal"))
        return {file: file.read_bytes() for file in files if file.exists()}

    def put_back(self, copy: Any) -> None:
        for file in self._path.parent.iterdir():
            file.unlink()
        for file, data in copy.items():
            file.write_bytes(data)


class OnServer:
    """A ledger of its own on a Redis or Valkey server."""

    def __init__(self, server: ValkeyServer) -> None:
        self._subject = RedisSubject(server)
        self._subject.archive_from = ARCHIVE_FROM

    def features(self, budget_bytes: int) -> SimulatedStore:
        return InMemoryLightFeatureStore(budget_bytes)

    def open(self) -> Ledger:
        return self._subject.open()

    def copy(self, ledger: Ledger) -> None:
        self._subject.save()

    def put_back(self, copy: None) -> None:
        self._subject.restore()
