"""Every feature store: its name in run files, and where its section is. One line per store."""

from __future__ import annotations

from paceline.table import Table

STORES = Table(
    "feature store",
    "paceline.stores",
    {
        "shm": "paceline.features.settings:SharedMemorySection",
        "directory": "paceline.features.settings:DirectorySection",
        "mooncake": "paceline.features.settings:MooncakeSection",
    },
)
