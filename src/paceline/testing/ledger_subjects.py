"""The stores that the ledger machine compares with the specification: how each is opened, and set back."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Protocol

from paceline.ledger.ledger import Ledger
from paceline.ledger.stores.redis import RedisLedger
from paceline.ledger.stores.redis.scripts import keys_of
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.valkey_server import ValkeyServer


class Subject(Protocol):
    archive_from: int  # how many samples or steps must be ready before any is archived
    block_size: int  # visits in one block of the archive

    def open(self) -> Ledger:
        """The ledger, or the one that lies there."""

    def save(self) -> None:
        """Keep a copy; the ledger is closed."""

    def restore(self) -> None:
        """Put the copy back, as a ledger without its last changes; the ledger is closed."""


class SQLiteSubject:
    archive_from, block_size = 1, 4096

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> Ledger:
        ledger = SQLiteLedger(self.path, durability="head")
        ledger.archive_from, ledger.block_size = self.archive_from, self.block_size
        return ledger

    def save(self) -> None:
        shutil.copy(self.path, self.path.with_suffix(".saved"))

    def restore(self) -> None:
        shutil.copy(self.path.with_suffix(".saved"), self.path)
        self.path.with_name(self.path.name + "-gate").unlink()  # it knows that more was on the disk


class RedisSubject:
    archive_from, block_size = 1, 4096

    def __init__(self, server: ValkeyServer) -> None:
        self.server, self.name = server, uuid.uuid4().hex

    def open(self) -> Ledger:
        ledger = RedisLedger(self.server.url, self.name, durability="head")
        ledger.archive_from, ledger.block_size = self.archive_from, self.block_size
        return ledger

    def save(self) -> None:
        self._copy(self.name, f"{self.name}.saved")

    def restore(self) -> None:
        self._copy(f"{self.name}.saved", self.name)

    def _copy(self, source: str, target: str) -> None:
        with self.server.client() as client:
            for one, other in zip(keys_of(source), keys_of(target), strict=True):
                client.delete(other)
                client.copy(one, other)
