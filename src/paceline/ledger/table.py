"""Every ledger: its name in run files, and where its section is. One line per ledger."""

from __future__ import annotations

from paceline.table import Table

LEDGERS = Table(
    "ledger",
    "paceline.ledgers",
    {
        "redis": "paceline.ledger.settings:RedisSection",
        "sqlite": "paceline.ledger.settings:SqliteSection",
    },
)
