"""Every metadata store runs the one suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.ledger.store import MetadataStore
from paceline.ledger.stores.memory import InMemoryMetadataStore
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.testing.metadata_store_suite import MetadataStoreSuite


class TestInMemoryMetadataStore(MetadataStoreSuite):
    def make(self) -> MetadataStore:
        return InMemoryMetadataStore()


class TestSQLiteMetadataStore(MetadataStoreSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self) -> MetadataStore:
        return SQLiteMetadataStore(self.folder / "ledger.db")
