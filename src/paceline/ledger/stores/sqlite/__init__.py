"""The metadata store in one SQLite file; see store.py."""

from paceline.ledger.stores.sqlite.database import (
    SQLITE_BACKPORTS,
    SQLITE_FLOOR,
    Durability,
    check_sqlite_version,
)
from paceline.ledger.stores.sqlite.schema import APPLICATION_ID, SCHEMA_USER_VERSION
from paceline.ledger.stores.sqlite.store import SQLiteMetadataStore

__all__ = [
    "APPLICATION_ID",
    "SCHEMA_USER_VERSION",
    "SQLITE_BACKPORTS",
    "SQLITE_FLOOR",
    "Durability",
    "SQLiteMetadataStore",
    "check_sqlite_version",
]
