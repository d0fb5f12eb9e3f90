"""The ledger in one SQLite file; see ledger.py."""

from paceline.ledger.stores.sqlite.database import (
    IN_MEMORY,
    SQLITE_BACKPORTS,
    SQLITE_FLOOR,
    Durability,
    check_sqlite_version,
    refuse_place,
)
from paceline.ledger.stores.sqlite.ledger import SQLiteLedger
from paceline.ledger.stores.sqlite.schema import APPLICATION_ID, SCHEMA_VERSION

__all__ = [
    "APPLICATION_ID",
    "IN_MEMORY",
    "SCHEMA_VERSION",
    "SQLITE_BACKPORTS",
    "SQLITE_FLOOR",
    "Durability",
    "SQLiteLedger",
    "check_sqlite_version",
    "refuse_place",
]
