"""Every metadata store runs the one suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.ledger.store import MetadataStore
from paceline.ledger.stores.memory import InMemoryMetadataStore
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.testing.metadata_protocol_suite import MetadataProtocolSuite
from paceline.testing.metadata_store_suite import MetadataStoreSuite


class TestInMemoryMetadataStore(MetadataStoreSuite, MetadataProtocolSuite):
    def make(self) -> MetadataStore:
        return InMemoryMetadataStore()


class TestSQLiteMetadataStore(MetadataStoreSuite, MetadataProtocolSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self) -> MetadataStore:
        store = SQLiteMetadataStore(self.folder / "ledger.db")
        store.fold_from = 1  # fold at once what a real run folds by the thousand
        return store


class TestSQLiteMetadataStoreSyncingHeadsOnly(TestSQLiteMetadataStore):
    def make(self) -> MetadataStore:
        store = SQLiteMetadataStore(self.folder / "ledger.db", durability="head")
        store.fold_from = 1
        return store
