"""Every export: the name of the server that loads it, and where its class is. One line per export."""

from __future__ import annotations

from paceline.table import Table

EXPORTS = Table("export", "paceline.exports", {})
