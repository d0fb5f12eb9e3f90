"""Every ledger runs the one suite, the specification first."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.ledger.ledger import Ledger
from paceline.ledger.stores.redis import RedisLedger
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.ledger_protocol_suite import LedgerProtocolSuite
from paceline.testing.ledger_suite import LedgerSuite
from paceline.testing.specification_of_steps import SpecificationLedger
from paceline.testing.valkey_server import ValkeyServer


class TestSpecificationLedger(LedgerSuite, LedgerProtocolSuite):
    def make(self) -> Ledger:
        ledger = SpecificationLedger()
        ledger.archive_from = 1
        return ledger


class TestSQLiteLedger(LedgerSuite, LedgerProtocolSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self) -> Ledger:
        ledger = SQLiteLedger(self.folder / "ledger.db")
        ledger.archive_from = 1  # archive at once what a real run archives by the thousand
        return ledger


class TestSQLiteLedgerSyncingHeadsOnly(TestSQLiteLedger):
    def make(self) -> Ledger:
        ledger = SQLiteLedger(self.folder / "ledger.db", durability="head")
        ledger.archive_from = 1
        return ledger


class TestSQLiteLedgerInMemory(LedgerSuite, LedgerProtocolSuite):
    def make(self) -> Ledger:
        ledger = SQLiteLedger()
        ledger.archive_from = 1
        return ledger


class TestRedisLedger(LedgerSuite, LedgerProtocolSuite):
    @pytest.fixture(autouse=True)
    def _server(self, valkey: ValkeyServer) -> Iterator[None]:
        self.url, self.opened = valkey.url, list[RedisLedger]()
        yield
        for ledger in self.opened:
            ledger.close()

    def make(self) -> Ledger:
        ledger = RedisLedger(self.url, uuid.uuid4().hex, durability="head")
        ledger.archive_from = 1
        self.opened.append(ledger)
        return ledger
