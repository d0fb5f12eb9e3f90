"""Every export: the name of the server or format, and where its adapter is. One line per export."""

from __future__ import annotations

from paceline.table import Table

EXPORTS = Table(
    "export",
    "paceline.exports",
    {
        "vllm": "paceline.exports.servers:VLLM",
        "sglang": "paceline.exports.servers:SGLANG",
        "speculators": "paceline.exports.servers:SPECULATORS",
        "hf": "paceline.exports.servers:HF",
    },
)
